from collections import Counter

import numpy as np
import pytest
from bundle.errors import UserError


@pytest.fixture
def covid_ct(tmp_path, picture):
    """COVID-CT with two COVID slices of one patient for training, named once with and once without suffix in the table."""
    folder = tmp_path / "COVID-CT"
    lists = {
        "COVID/trainCT_COVID": ["2020.01.24-p27%0.png", "2020.01.24-p27%1.png"],
        "COVID/valCT_COVID": ["v.png"],
        "COVID/testCT_COVID": ["t.png"],
        "NonCOVID/trainCT_NonCOVID": ["25.png"],
        "NonCOVID/valCT_NonCOVID": ["25.jpg"],
        "NonCOVID/testCT_NonCOVID": [],
    }
    for listing, names in lists.items():
        path = folder / f"Data-split/{listing}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n\n")
        for name in names:
            picture(folder / f"Images-processed/CT_{path.parent.name}" / name, (40, 60))
    rows = ['2020.01.24-p27%0.png,Patient 1,41,"a, b",,', "2020.01.24-p27%1,Patient 1 ,41"]
    (folder / "COVID-CT-MetaInfo.csv").write_text("\n".join(["File name,Patient ID,Age,Captions", *rows]))
    (folder / "NonCOVID-CT-MetaInfo.csv").write_text(",image name,patient id\n0,25.png,1.3.6\n")
    return folder


def test_covid_ct_original(covid_ct, merged, caplog):
    caplog.set_level("INFO")
    records = merged(covid_ct)
    found = {split: [(record["class"], record["group"]) for record in records[split]] for split in records}
    assert found == {
        "training": 2 * [(1, "covid_ct/COVID-CT-MetaInfo Patient 1")] + [(0, "covid_ct/NonCOVID-CT-MetaInfo 1.3.6")],
        "validation": [(1, "covid_ct/v.png"), (0, "covid_ct/25.jpg")],
        "test": [(1, "covid_ct/t.png")],
    }
    assert "3 images of patients that no *MetaInfo*.csv names" in caplog.text



def test_covid_ct_without_listed_images_is_refused(covid_ct, merged, caplog):
    (covid_ct / "Images-processed/CT_COVID/v.png").unlink()
    assert "validation" in merged(covid_ct) and "v.png: image: found no file" in caplog.text
    (covid_ct / "Images-processed/CT_COVID/t.png").unlink()
    with pytest.raises(UserError, match=r"v.png: image: found no file .* \(2 of 6 slices cannot be used, 33%\)"):
        merged(covid_ct)


@pytest.fixture
def iqoth(tmp_path, picture):
    """IQ-OTH/NCCD with two patients in each folder, slices of one alike, numbered so that names sort otherwise."""
    rng = np.random.default_rng(0)
    for case in ("Normal", "Bengin", "Malignant"):
        chests = [np.kron(rng.integers(40, 200, (5, 6)), np.ones((8, 10))) for _ in range(2)]
        for number in range(8, 12):
            noise = rng.integers(0, 10, (40, 60))
            picture(tmp_path / f"IQ/{case} cases/{case} case ({number}).jpg", chests[number > 9] + noise)
    return tmp_path / "IQ"


def test_iqoth_nccd_original(iqoth, merged):
    records = [record for found in merged(iqoth).values() for record in found]
    groups = Counter((record["group"], record["class"]) for record in records)
    labels = {"normal": 0, "bengin": 0, "malignant": 2}
    assert groups == {(f"iqoth_nccd/{case}_{run}", labels[case]): 2 for case in labels for run in (0, 1)}
    names = {record["image"].split("(")[1][:2] for record in records if record["group"].endswith("_1")}
    assert names == {"10", "11"}



@pytest.fixture
def inf_net(tmp_path, picture):
    """Inf-Net's folders of eight training slices and two test slices, stored transposed: here 60 rows and 40 columns."""
    for place, count in (("TrainingSet/LungInfection-Train/Doctor-label", 8), ("TestingSet/LungInfection-Test", 2)):
        for number in range(count):
            pixels, mask = np.full((60, 40), 20), np.zeros((60, 40))
            pixels[30:50, 5:10], mask[30:50, 5:10] = 200, 255
            picture(tmp_path / f"Inf/{place}/Imgs/{number}.png", pixels)
            picture(tmp_path / f"Inf/{place}/GT/{number}.png", mask)
    return tmp_path / "Inf"


def test_inf_net(inf_net, merged, samples):
    assert {split: len(found) for split, found in merged(inf_net).items()} == {"training": 6, "validation": 2, "test": 2}
    found = samples(inf_net)
    assert len({sample["record"]["group"] for sample in found}) == 10
    for sample in found:
        assert sample["image"].shape == sample["mask"].shape == (1, 40, 60)
        assert sample["mask"][0, 5:10, 30:50].all() and sample["mask"].sum() == 100
        assert ((sample["image"] > 100) == (sample["mask"] > 0)).all()
        assert sample["record"]["source"] == "medseg_covid19"


MISSING = [  # fixture, what is not there, words of the line
    ("covid_ct", "Data-split/NonCOVID/valCT_NonCOVID.txt", "valCT_NonCOVID.txt: no such file, expected the official list"),
    ("iqoth", "Bengin cases", "Bengin cases: no such folder"),
    ("inf_net", "TestingSet/LungInfection-Test/GT/1.png", "GT/1.png: no such file, expected the mask of .*Imgs/1.png"),
]


@pytest.mark.parametrize(("layout", "missing", "words"), MISSING)
def test_a_layout_without_one_of_its_parts_is_refused(request, merged, layout, missing, words):
    folder = request.getfixturevalue(layout)
    (folder / missing).rename(folder / "gone")
    with pytest.raises(UserError, match=words):
        merged(folder)
