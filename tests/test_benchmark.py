"""The benchmark compares like with like; how fast this machine is, is not tested."""

from pathlib import Path

import pytest
import torch

from bundle.benchmark import (
    _differences,
    backends,
    data_pipeline,
    open_config,
    report,
    report_backends,
    sharing,
    training_step,
)
from bundle.networks import TensorView
from bundle.names import TASKS

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def parser(phantom_dir, tmp_path):
    files = [str(CONFIGS / name) for name in ("train.json", "preset_smoke.json")]
    return open_config(files, dataset_dir=str(phantom_dir), output_dir=str(tmp_path), batch_size=2, device="cpu", seed=None)


def test_networks_of_one_task_are_the_parts_of_the_network_of_all(parser):
    shared = sharing(parser, turns=1)
    assert list(shared["seconds"]) == ["all tasks", *TASKS] and min(shared["seconds"].values()) > 0
    parameters, network = shared["parameters"], parser.get_parsed_content("network_def")
    encoder = sum(p.numel() for p in network.encoder.parameters())
    assert parameters["all tasks"] == sum(p.numel() for p in network.parameters())
    assert sum(parameters[task] - encoder for task in TASKS) + encoder == parameters["all tasks"]
    single = sum(parameters[task] for task in TASKS)
    assert shared["ratio"]["parameters"] == pytest.approx(single / parameters["all tasks"])
    assert shared["ratio"]["seconds"] > 0


def test_trainer_and_plain_loop_do_the_same_work(parser):
    step = training_step(parser, turns=3)
    assert step["loss_difference"] == 0, "same weights, batches and random numbers: the same loss, bit for bit"
    assert step["ratio"] > 0 and set(step["seconds"]) == {"trainer", "plain"}


def test_report_names_the_ratios_and_their_goals(parser):
    text = report(parser, turns=1)
    assert data_pipeline(parser, turns=1) > 0
    assert text.count("(goal: ") == 3 and "vgg13_bn, 64 x 64 pixels, 6 training records, seed 0" in text


@pytest.fixture
def prediction(phantom_dir, tmp_path):
    files = [str(CONFIGS / name) for name in ("inference.json", "preset_smoke.json")]

    def open_prediction(**entries):
        common = {"checkpoint": "", "device": "cpu", "batch_size": 2, "output_dir": str(tmp_path / "out")}
        return open_config(files, **{**common, "input": str(phantom_dir / "images"), **entries})

    return open_prediction


def test_backends_answer_the_same_slices_alike(prediction, tmp_path):
    parser = prediction()
    measured = backends(parser, turns=2)
    rows = ["torch", "torch, one by one", "onnxruntime", "openvino"]
    for key in ("first_call", "seconds", "ratio", "ratio_alone", "difference"):
        assert list(measured[key]) == rows
    assert min(measured["seconds"].values()) > 0 and min(measured["ratio"].values()) > 0
    assert measured["ratio"]["torch"] == measured["ratio_alone"]["torch, one by one"] == 1
    names = {"classification", "segmentation", "reconstruction", "embedding", "boxes", "scores", "masks"}
    for row in rows:
        assert measured["difference"][row].keys() == names and max(measured["difference"][row].values()) < 1e-3
    assert set(measured["difference"]["torch"].values()) == {0}
    assert 0 < measured["detections"] <= 10
    # Other weights are other answers, from the file that is named.
    network = parser.get_parsed_content("multitask_net")
    network.heads["detection"].roi_heads.score_thresh = 2.0
    torch.save(network.state_dict(), tmp_path / "model.pt")
    text = report_backends(prediction(checkpoint=str(tmp_path / "model.pt"), tasks={"segmentation": 1.0}), turns=1)
    assert "vgg13_bn, model.pt, 64 x 64 pixels, batch of 2, 0.0 detections in a slice, median of 1 turns" in text
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith(tuple(rows))] == rows + rows[1:]


def test_exported_files_are_compared_as_well(prediction, tmp_path):
    network = prediction().get_parsed_content("multitask_net").eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    torch.jit.script(TensorView(network)).save(tmp_path / "all.ts")
    network.heads["segmentation"].output[0].bias.data += 0.5
    torch.jit.script(TensorView(network)).save(tmp_path / "other.ts")
    parser = prediction(checkpoint=str(tmp_path / "model.pt"))
    difference = backends(parser, 1, [str(tmp_path / name) for name in ("all.ts", "other.ts")])["difference"]
    assert difference["all.ts"].keys() == difference["torch"].keys() - {"embedding"}
    assert max(difference["all.ts"].values()) < 1e-3
    assert difference["other.ts"]["segmentation"] == pytest.approx(0.5)


def test_differences_are_seen_whatever_the_order_of_equal_detections():
    def answer(*boxes, shift=0.0):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        masks = torch.arange(len(boxes), dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        scores = torch.full([len(boxes)], 0.5)
        return {"segmentation": torch.ones(2, 2) + shift, "detection": [{"boxes": boxes, "scores": scores, "masks": masks}]}

    one, other = (0, 0, 8, 8), (20, 20, 30, 30)
    expected, swapped = answer(one, other), answer(other, one)
    swapped["detection"][0]["masks"] = swapped["detection"][0]["masks"].flip(0)
    assert dict(_differences(swapped, expected)) == {"segmentation": 0, "boxes": 0, "scores": 0, "masks": 0}
    moved = dict(_differences(answer((0, 0, 8, 9), other, shift=0.25), expected))
    assert moved == {"segmentation": 0.25, "boxes": 1, "scores": 0, "masks": 0}
    assert dict(_differences(answer(one), expected))["boxes"] == float("inf")
    assert dict(_differences(answer(), answer()))["masks"] == 0


def test_backends_need_a_scan_that_can_be_read(prediction, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/note.txt").write_text("no image")
    with pytest.raises(ValueError, match="empty: found no"):
        backends(prediction(input=str(tmp_path / "empty")), turns=1)
