"""The benchmark compares like with like; how fast this machine is, is not tested."""

from pathlib import Path

import pytest

from bundle.benchmark import data_pipeline, open_config, report, sharing, training_step
from bundle.tasks import TASKS

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
