import numpy as np
import pytest

from bundle.data.sources.common import MIN_LESION_PIXELS, lesions, read_rows
from bundle.data.sources.published import pictures
from bundle.errors import UserError


def test_lesions_are_the_connected_parts_that_are_large_enough():
    mask = np.zeros((40, 60), np.uint8)
    mask[2:7, 30:50] = 255  # wide, so that columns and rows cannot be mistaken
    mask[20:24, 5:10] = 1
    mask[24:28, 10:15] = 1  # touches the part above at a corner
    mask[35, 55 : 55 + 4] = 255  # dust
    instances, boxes = lesions(mask)
    assert boxes == [[30, 2, 50, 7], [5, 20, 15, 28]]
    assert instances.dtype == np.uint8 and sorted(np.unique(instances)) == [0, 1, 2]
    for number, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        assert (mask[instances == number] > 0).all()
        assert (instances[y1:y2, x1:x2] == number).sum() == (instances == number).sum()
    assert (instances == 2).sum() == 40
    assert instances[35, 56] == 0


def test_lesions_inside_each_others_box_stay_apart():
    mask = np.zeros((30, 40), np.uint8)
    mask[2:28, 2:38] = 1
    mask[6:24, 6:34] = 0
    mask[12:18, 12:22] = 1  # within the ring
    instances, boxes = lesions(mask)
    assert boxes == [[2, 2, 38, 28], [12, 12, 22, 18]]
    assert (instances == 1).sum() == 26 * 36 - 18 * 28 and (instances == 2).sum() == 60


@pytest.mark.parametrize("pixels, found", [(MIN_LESION_PIXELS, 1), (MIN_LESION_PIXELS - 1, 0)])
def test_smallest_lesion(pixels, found):
    mask = np.zeros((10, 30), np.uint8)
    mask[4, :pixels] = 1
    assert len(lesions(mask)[1]) == found
    assert lesions(np.zeros((10, 30)))[1] == []


def test_rows_tell_their_line(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfa,b\n"1\n2",x\n3,y\n')
    rows = read_rows(tmp_path / "t.csv", ("a",))
    assert [row for _, row in rows] == [{"a": "1\n2", "b": "x"}, {"a": "3", "b": "y"}]
    assert [place for place, _ in rows] == [f"{tmp_path}/t.csv: line 3", f"{tmp_path}/t.csv: line 4"]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "no such file, expected a table"),
        ("", "found the columns none, expected a, b or c, separated by commas, semicolons or tabs"),
        ("a|b\n1|2\n", r"found the columns 'a\|b', expected a, b or c, separated by commas, semicolons or tabs"),
        ("My slices,,\na,b\n1,2\n", "found the columns 'my_slices', expected a, b or c"),
        ("a,b,A\n1,2,3\n", "found the column 'a' twice, expected each once"),
        ("a,c\n", "found no row below the header, expected one or more"),
        ('a,b\n"1,2\n3,4\n', r"cannot be read \(a quote is not closed\), expected a comma"),
        ("a,b\nLänge,2\n".encode("latin-1"), "expected a comma-separated table; save it as CSV UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), r"cannot be read \(zero bytes, as in UTF-16\), expected"),
        (b"PK\3\4\0\xff", r"cannot be read \(a workbook of Excel\), expected a comma-separated table; save it as CSV UTF-8"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as error:
        read_rows(path, ("a", "b or c"))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_folder_of_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder, expected one of pictures"):
        pictures(tmp_path / "nowhere")
