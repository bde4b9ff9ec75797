from pathlib import Path

import command
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset, MetaTensor
from pydicom import dcmread
from pydicom.data import get_testdata_file
from scipy.spatial.distance import mahalanobis

from bundle.data.datalist import load_datalist, select
from bundle.data.phantom import make_phantom
from bundle.errors import UserError
from bundle.files import file_hash, write_json
from bundle.lungs import lung_bearing, lung_mask
from bundle.evaluation.novelty import embed, make_reference, views
from bundle.inference.novelty import assess
from bundle.networks import Novelty, read_novelty

ROOT = Path(__file__).parents[2]
WINDOW = (-1350, 150)


def test_distance_is_mahalanobis():
    generator = np.random.default_rng(0)
    mean, scale, factor = generator.normal(size=4), generator.uniform(1, 3, 4), generator.normal(size=(4, 4))
    precision = factor @ factor.T
    points = generator.normal(size=(5, 4))
    novelty = Novelty(*map(torch.from_numpy, (mean, scale, precision)))
    expected = [mahalanobis(point / scale, mean / scale, precision) for point in points]
    np.testing.assert_allclose(novelty.distance(torch.from_numpy(points)), expected)
    assert novelty.distance(torch.from_numpy(mean[None])).tolist() == [0]


def image(hounsfield):
    pixels = torch.zeros(1, 8, 8)
    pixels[0, 1:7, 2:8] = torch.linspace(0.1, 1, 36).reshape(6, 6)
    pixels[0, 3, 4] = 0  # air in the picture
    return MetaTensor(pixels, meta={"hounsfield": hounsfield})


def test_a_picture_is_also_seen_with_the_grey_air_of_a_scan():
    plain, grey, mirrored, grey_mirrored = views(image(False), WINDOW)
    assert torch.equal(plain, image(False).as_tensor()) and torch.equal(mirrored, plain.flip(-1))
    air = (-1000 + 1350) / 1500
    assert grey[0, 3, 4] == pytest.approx(air) and grey.max() == 1
    torch.testing.assert_close(grey[0, 1:7, 2:8], air + (1 - air) * plain[0, 1:7, 2:8])
    assert not grey[0, 0].any() and not grey[0, :, :2].any()  # padding stays black
    assert torch.equal(grey_mirrored, grey.flip(-1))
    assert torch.equal(views(image(False), (-900, 100))[1], plain)  # a window in which air is black
    in_hu = image(True).as_tensor()
    assert torch.equal(views(image(True), WINDOW), torch.stack([in_hu, in_hu.flip(-1)])), "a scan has its grey already"


NOVELTY = Novelty(torch.zeros(1), torch.ones(1), torch.eye(1), threshold=10)


@pytest.mark.parametrize(
    ("distances", "bearing", "share", "warnings"),
    [
        ([1, 2, 30], None, 1 / 3, []),
        ([1, 20, 30], None, 2 / 3, ["unlike the training data: 67% of 3 slices"]),
        ([11], None, 1, ["unlike the training data: 100% of 1 slices are farther from it than 10.0 (median 11.0)"]),
        ([10], None, 0, []),
        ([30, 1, 2, 30], [False, True, True, False], 0, []),  # neck and abdomen do not count
        ([1, 30, 30, 1], [False, True, True, False], 1, ["unlike the training data: 100% of 2 slices"]),
        ([1, 1, 1, 1], [False] * 4, 0, ["no lung found: this is no chest CT, or its values are not HU"]),
        ([30, 30], [False] * 2, 1, ["unlike the training data", "no lung found"]),
        ([1] * 10, [True] * 2 + [False] * 8, 0, ["lung in 2 of 10 slices"]),
        ([1] * 10, [True] * 3 + [False] * 7, 0, []),
        ([1], [True], 0, []),
    ],
)
def test_scans_are_judged_by_their_slices(distances, bearing, share, warnings):
    summary, found = assess(NOVELTY, distances, bearing)
    kept = [d for d, lung in zip(distances, bearing) if lung] if bearing and any(bearing) else distances
    assert summary == {"distance": np.median(kept), "threshold": 10, "unusual_share": round(share, 4)}
    assert len(found) == len(warnings) and all(line.startswith(start) for line, start in zip(found, warnings))
    assert not any("\n" in line for line in found)


def test_without_a_reference_the_lung_alone_is_judged():
    assert assess(None, [None], None) == (None, [])
    summary, warnings = assess(None, [None], [False])
    assert summary is None and len(warnings) == 1


@pytest.fixture
def reference(tmp_path):
    """reference.pt and the weights it belongs to."""
    (tmp_path / "model.pt").write_bytes(b"weights")
    saved = {"mean": torch.zeros(2), "scale": torch.ones(2), "precision": torch.eye(2), "threshold": 3.5}
    torch.save({**saved, "checkpoint": file_hash(tmp_path / "model.pt")}, tmp_path / "reference.pt")
    return tmp_path / "reference.pt"


def test_a_reference_belongs_to_its_weights(reference, tmp_path):
    checkpoint = reference.with_name("model.pt")
    novelty = read_novelty(reference, checkpoint)
    assert novelty.threshold == 3.5 and novelty.distance(torch.tensor([[3.0, 4.0]])).tolist() == [5]
    checkpoint.write_bytes(b"other weights")
    with pytest.raises(UserError, match="reference.pt: found the reference of other weights than .*model.pt; make it anew"):
        read_novelty(reference, checkpoint)


def test_no_reference_is_none(tmp_path):
    assert read_novelty(tmp_path / "reference.pt", tmp_path / "model.pt") is None
    with pytest.raises(UserError, match="reference: found no file .*typo.pt, expected one made by run reference"):
        read_novelty(tmp_path / "typo.pt", tmp_path / "model.pt")


def test_a_feature_that_never_fires_in_training_does_not_decide_alone(tmp_path, monkeypatch):
    features = torch.randn(4000, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[:, 3] = 0
    monkeypatch.setattr("bundle.evaluation.novelty.embed", lambda network, slices, window: slices)
    (tmp_path / "model.pt").write_bytes(b"weights")
    make_reference(None, features, features[:500], (0, 1), tmp_path / "model.pt", tmp_path / "reference.pt")
    novelty = read_novelty(tmp_path / "reference.pt", tmp_path / "model.pt")
    usual = features[:1].float()
    fired = usual.clone()
    fired[0, 3] = 0.001
    assert novelty.distance(fired).item() == pytest.approx(novelty.distance(usual).item(), rel=0.01)


@pytest.mark.parametrize("content", [b"", b"text", {"mean": torch.zeros(2)}, {"checkpoint": "", "scale": 1}, [1]], ids=str)
def test_a_file_that_is_no_reference_is_refused_in_one_line(reference, content):
    if isinstance(content, bytes):
        reference.write_bytes(content)
    else:
        torch.save(content, reference)
    with pytest.raises(ValueError, match=r"reference.pt: cannot be read as a reference") as caught:
        read_novelty(reference, reference.with_name("model.pt"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def parser(save_smoke, tmp_path_factory):
    """The configuration of an evaluation on phantom slices of 64 pixels, with untrained weights in its output folder."""
    folder = tmp_path_factory.mktemp("novelty")
    parser = ConfigParser()
    parser.read_config([ROOT / f"configs/{name}.json" for name in ("train", "preset_smoke", "evaluate")])
    parser["dataset_dir"] = str(make_phantom(folder / "phantom", size=64, groups=(24, 24, 3), slices_per_group=2))
    parser["output_dir"] = str(folder)
    network = save_smoke(folder / "model.pt", tasks={"classification": 1.0})
    parser.get_parsed_content("network").load_state_dict(network.state_dict())
    return parser


@pytest.fixture(scope="module")
def novelty(parser):
    """The reference, read back."""
    get = parser.get_parsed_content
    loaders, path = (get("reference_slices#training"), get("reference_slices#validation")), f"{get('output_dir')}/reference.pt"
    make_reference(get("network"), *loaders, WINDOW, get("checkpoint"), path)
    return read_novelty(path, get("checkpoint"))


def test_three_in_a_hundred_validation_slices_are_unusual(parser, novelty):
    embeddings = embed(parser.get_parsed_content("network"), parser.get_parsed_content("reference_slices#validation"), WINDOW)
    distances = novelty.distance(embeddings)
    assert len(distances) == 2 * 48  # phantoms are in HU
    assert 0 < (distances > novelty.threshold).float().mean() <= 0.03


def unusual(kind):
    """Pictures in [0, 1] of 64 x 64 pixels that show no chest."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(rows, columns / 0.8)
    if kind == "head":
        return np.where(radius < 0.8, np.where(radius < 0.7, 0.93, 1.0), 0.23) + generator.normal(0, 0.01, (64, 64))
    if kind == "uniform noise":
        return generator.uniform(0, 1, (64, 64))
    pixels = dcmread(get_testdata_file("MR_small.dcm")).pixel_array.astype(float)  # 64 x 64
    return (pixels - pixels.min()) / np.ptp(pixels)


@pytest.mark.parametrize("kind", ["head", "uniform noise", "MR"])
def test_what_is_no_chest_is_unusual_even_to_untrained_features(parser, novelty, kind):
    network = parser.get_parsed_content("network").eval()
    with torch.no_grad():
        answer = network(torch.from_numpy(unusual(kind)).float().clamp(0, 1)[None, None])
    assert novelty.distance(answer["embedding"]).item() > novelty.threshold


@pytest.mark.parametrize("name", ["J2K_pixelrep_mismatch.dcm", "CT_small.dcm"], ids=["head", "spine"])
def test_a_ct_of_another_part_has_no_lung(name):
    dataset = dcmread(get_testdata_file(name, download=False))
    hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    spacing = [float(side) for side in dataset.PixelSpacing]
    area = lung_mask(hu, spacing).sum() * np.prod(spacing)
    _, warnings = assess(None, [None], lung_bearing([area]))
    assert len(warnings) == 1 and warnings[0].startswith("no lung found")


def test_the_command_writes_the_reference_and_leaves_the_test_split_alone(parser, tmp_path):
    checkpoint, folder = parser.get_parsed_content("checkpoint"), Path(parser["dataset_dir"])
    records = load_datalist(folder / "datalist.json")
    write_json({**records, "test": []}, tmp_path / "datalist.json")
    knobs = {"dataset_dir": folder, "datalist": tmp_path / "datalist.json", "output_dir": tmp_path, "checkpoint": checkpoint}
    done = command.run(*command.bundle("reference", configs=("train", "preset_smoke", "evaluate"), **knobs))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"datalist.json", "reference.pt", "manifest.txt"}
    novelty = read_novelty(tmp_path / "reference.pt", checkpoint)
    training = Dataset(select(records, "training", parser.get_parsed_content("task_list"), folder), parser.get_parsed_content("preprocessing"))
    known = embed(parser.get_parsed_content("network"), [[sample] for sample in training], WINDOW)
    torch.testing.assert_close(novelty.mean, known.mean(0), msg="of the training slices, not of the validation's")
    assert 0 < novelty.threshold < np.inf and novelty.mean.shape == novelty.precision.shape[:1]
