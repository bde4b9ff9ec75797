"""All four tasks through MONAI's export commands, as docs/export.md has them, against PyTorch."""

import re
import shlex
from pathlib import Path

import monai.bundle
import pytest
import torch
from fire import Fire

from benchmark import read_exported
from some_tasks import some_network

from bundle.errors import UserError
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(
    r"^    python -m monai\.bundle (\S+_export tensor_net .*)$", (ROOT / "docs/export.md").read_text(), re.M
)
# configs/preset_smoke.json
SMOKE = {"decoder_channels": [32, 32, 16, 8, 8], "image_size": 64}
SMOKE["detection"] = {"fpn_channels": 16, "box_features": 32, "mask_channels": [16], "detections_per_image": 10}
DENSE = {CLASSIFICATION, SEGMENTATION, RECONSTRUCTION}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = some_network(TASKS, **SMOKE).eval()
    network.heads[DETECTION].roi_heads.box_predictor.cls_score.weight.data *= 30  # scores far apart
    return network


@pytest.mark.parametrize(
    ("name", "answers"), [("all_tasks.ts", set(TASKS)), ("all_tasks.onnx", set(TASKS)), ("dense.onnx", DENSE)]
)
def test_the_exported_file_answers_as_the_network(network, name, answers, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (words,) = [words for words in map(shlex.split, COMMANDS) if words[words.index("--filepath") + 1] == f"models/{name}"]
    replaced = {
        "models/model.pt": str(tmp_path / "model.pt"),
        f"models/{name}": str(tmp_path / name),
    }
    Fire(monai.bundle, command=[*[replaced.get(word, word.replace("256,256", "64,64")) for word in words], "--checkpoint", str(tmp_path / "model.pt")])
    exported = read_exported(str(tmp_path / name), TASKS)
    image = torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        expected, found = network(image), exported(image)
    assert found.keys() == answers
    for task in DENSE:
        torch.testing.assert_close(found[task], expected[task], rtol=0, atol=1e-3)
    if DETECTION in answers:
        assert len(expected[DETECTION]) == len(found[DETECTION]) == 3
        assert sum(len(detection["boxes"]) for detection in expected[DETECTION]) > 0
        for one, other in zip(found[DETECTION], expected[DETECTION]):
            for part in ("boxes", "scores", "masks"):
                torch.testing.assert_close(one[part], other[part], rtol=0, atol=1e-3)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.ts: no such exported network"):
        read_exported(str(tmp_path / "none.ts"), TASKS)
