import base64
import io
import json
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from report_page import EVIL, make_page, make_scan, make_view

from bundle.data.transforms import LoadSlice
from bundle.inference.report import COMPANDING, Report


class Page(HTMLParser):
    """What a browser would find: tags, text, and the JSON that the script reads."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.json, self.text, self.open = [], {}, "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.open = attrs.get("id") if tag == "script" and attrs.get("type") == "application/json" else tag

    def handle_data(self, data):
        if self.open in ("data",) or str(self.open).startswith("pictures-"):
            self.json[self.open] = json.loads(data)
            self.open = None
        elif self.open not in ("script", "style"):
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def decoded(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


def test_the_pictures_give_back_what_was_put_in(path):
    make_page(path)
    page = Page(path)
    pixels = np.linspace(-1350, 1650, 2400).reshape(40, 60) - 20
    codes, values = zip(*page.json["data"]["slices"][1]["codes"])
    shown = np.interp(decoded(page.json["pictures-1"]["image"]), codes, values)
    soft = (pixels > -150) & (pixels < 230)
    assert np.abs(shown - pixels)[soft].mean() < 10 and np.abs(shown - pixels).mean() < 40
    labels = np.zeros((40, 60))
    labels[12:18, 8:22] = 1
    np.testing.assert_array_equal(decoded(page.json["pictures-1"]["labels"]), labels)
    assert page.json["pictures-0"]["labels"] is None
    rebuilt = decoded(page.json["pictures-1"]["rebuilt"]) / 255
    np.testing.assert_allclose(rebuilt, ((pixels + 1350) / 1500).clip(0, 1) * 0.9, atol=0.03)
    assert page.json["data"]["slices"][1]["network"] == [-1350, 150]


def test_companding_uses_all_codes_and_is_finest_in_soft_tissue():
    codes, values = map(np.array, zip(*COMPANDING))
    assert codes[0] == 0 and codes[-1] == 255 and (np.diff(values) > 0).all()
    steps = np.diff(np.interp(np.arange(256), codes, values))
    soft = (np.interp(np.arange(255), codes, values) >= -160) & (np.interp(np.arange(1, 256), codes, values) <= 240)
    assert steps[soft].max() < 3.5 and steps.max() < 45


def test_a_picture_without_hounsfield_units_is_told_in_percent_of_what_the_network_sees(path):
    make_page(path, count=1, hounsfield=False)
    data = Page(path).json["data"]
    assert data["unit"] == "%" and data["slices"][0]["codes"] == [[0, -17.5], [255, 132.5]]
    assert [window["width"] for window in data["windows"]] == [100, 50, 50]


def test_boxes_lie_in_the_turned_slice_and_carry_the_number_of_their_lesion(path):
    make_page(path)
    data = Page(path).json["data"]
    assert data["slices"][1]["boxes"] == [{"box": [5.0, 10.0, 25.0, 20.0], "score": 0.75, "lesion": 7}]
    assert data["slices"][0]["boxes"] == []
    assert data["spacing"] == [2.0, 1.0] and (data["rows"], data["columns"]) == (40, 60)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PLS", "AIR", "SLP", "IRA"])
def test_spacing_follows_the_turn_of_the_slice(tmp_path, axes):
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    lying = nib.Nifti1Image(np.zeros((6, 5, 1), np.float32), np.diag([0.5, 0.75, 3.0, 1.0]))
    image = lying.as_reoriented(turn)
    nib.save(image, tmp_path / "x.nii")
    assert LoadSlice()(tmp_path / "x.nii").meta["spacing"] == pytest.approx((0.75, 0.5))


def test_text_of_files_and_tags_stays_text(path):
    names = {"z": EVIL, "a": "</script><!--"}
    probabilities = {name: 0.5 for name in names.values()}
    classification = {"predicted": EVIL, "probabilities": probabilities, "slices": 3, "agreeing": 1}
    harmless, evil = path.with_name("harmless.html"), {"model": dict.fromkeys(("name", "version", "checkpoint"), EVIL)}
    make_page(harmless, tasks=("classification",), warnings=["x"], identifiers={"x": "x"}, files={"x": "x"})
    evil |= {"warnings": ['"><img src=x onerror=alert(1)>'], "identifiers": {EVIL: EVIL}}
    evil["files"] = {EVIL: "javascript:alert(1)"}
    make_page(path, tasks=("classification",), scan=EVIL, classification=classification, **evil)
    page, expected = Page(path), Page(harmless)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert page.text.count(EVIL) >= 6
    assert not any(value and value.startswith("javascript:") for _, attrs in page.tags for value in attrs.values())


def test_the_page_holds_everything_it_shows(path):
    make_page(path)
    page = Page(path)
    sources = [attrs[key] for _, attrs in page.tags for key in ("src", "srcset", "data") if key in attrs]
    assert sources == [] and [a["href"] for tag, a in page.tags if tag == "link"] == ["data:,"]
    html = path.read_text().replace("http://www.w3.org/2000/svg", "")  # the name of SVG, not asked for
    assert "http://" not in html and "https://" not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_results_are_told_in_words(path):
    novelty = {"distance": 30.0, "threshold": 20.0, "unusual_share": 0.75}
    make_page(path, warnings=["3 slices are missing"], novelty=novelty)
    text = " ".join(Page(path).text.split())
    assert "Research use only – not for clinical use" in text
    assert "a model 1.2.3 · checkpoint 0123456789ab" in text and "3 slices are missing" in text
    assert "3.2 mL · 12.5 % of lung" in text and "4.00 L · slices 0–2" in text and "20 × 20 × 5" in text
    assert "slices that agree 2 of 3" in text.replace("agree2", "agree 2") and "certainty" not in text
    assert "Slice 1 · largest lesion area, 1.7 cm²" in text and "Slice 1 · highest score, lesion 7, 0.75" in text
    unsure = {"predicted": "a", "probabilities": {"a": 0.4, "z": 0.3, "y": 0.3}, "slices": 3, "agreeing": 2}
    make_page(path, tasks=("classification",), classification=unsure)
    assert "the other classes together are likelier" in Page(path).text
    assert "no lesion found; the middle of the scan" in Page(path).text
    assert "unlike what the model was trained on" in text and "75 % of the slices that show lung are unusual" in text


@pytest.mark.parametrize("task", ["classification", "segmentation", "reconstruction", "detection"])
def test_what_was_not_asked_is_not_shown(path, task):
    make_page(path, count=1, tasks=(task,), spacing=None, lung=None, novelty=None)
    shown = {attrs["aria-label"] for tag, attrs in Page(path).tags if tag == "section" and "hidden" not in attrs}
    assert shown == {task.capitalize(), "Slice viewer"}, "of one slice nothing is said twice"


def test_a_page_stays_below_10_megabytes_however_many_slices_it_has(path):
    random, (rows, columns) = np.random.default_rng(0), np.indices((512, 512)) / 256 - 1
    pixels = np.where((rows / 0.7) ** 2 + (columns / 0.9) ** 2 < 1, 40.0, -1000.0)
    pixels[(rows / 0.5) ** 2 + ((np.abs(columns) - 0.42) / 0.3) ** 2 < 1] = -850
    labels, noisy = (pixels == -850).astype(np.uint8), pixels + random.normal(0, 25, pixels.shape)
    sides = []
    for count in (40, 600):
        report = Report(make_scan((512, 512), count), [])
        for index in range(3):
            view = make_view(noisy, labels=labels, rebuilt=((pixels + 1350) / 1500).clip(0, 1))
            report.add(view, {"index": index})
        assert count * len(report.pictures[-1]) < 9.5e6
        sides.append(decoded(json.loads(report.pictures[-1])["image"]).shape[0])
    assert sides[0] == 512 and sides[1] >= 256
    report = Report(make_scan((3000, 1500), 1), [])
    report.add(make_view(np.zeros((3000, 1500)), labels=np.ones((3000, 1500), np.uint8)), {"index": 0})
    pictures = json.loads(report.pictures[0])
    assert decoded(pictures["image"]).shape == decoded(pictures["labels"]).shape == (1024, 512)
