import numpy as np
import pytest

from bundle.data.sources.common import MIN_LESION_PIXELS, lesions, read_rows
from bundle.data.sources.published import pictures
from bundle.errors import UserError


def test_lesions_are_the_connected_parts_that_are_large_enough():
    mask = np.zeros((60, 80), np.uint8)
    mask[2:7, 30:50] = 255  # wide, so that columns and rows cannot be mistaken
    mask[20:24, 5:10], mask[24:28, 10:15] = 1, 1  # which touch at a corner
    mask[30:56, 30:66], mask[34:52, 34:62], mask[40:46, 40:50] = 1, 0, 1  # one within the ring of the other
    mask[35, : MIN_LESION_PIXELS - 1], mask[37, :MIN_LESION_PIXELS] = 1, 1  # dust, and the smallest lesion
    instances, boxes = lesions(mask)
    assert boxes == [[30, 2, 50, 7], [5, 20, 15, 28], [30, 30, 66, 56], [0, 37, MIN_LESION_PIXELS, 38], [40, 40, 50, 46]]
    assert instances.dtype == np.uint8 and (mask[instances > 0] > 0).all() and instances[35, 5] == 0
    assert np.bincount(instances.ravel())[1:].tolist() == [100, 40, 26 * 36 - 18 * 28, MIN_LESION_PIXELS, 60]
    assert all((instances[y1:y2, x1:x2] == n).sum() == (instances == n).sum() for n, (x1, y1, x2, y2) in enumerate(boxes, 1))
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
