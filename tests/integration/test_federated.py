"""MONAI's client for federated learning drives the bundle as it is."""

import itertools
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.utils import set_determinism
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIGS = ["configs/train.json", "configs/preset_smoke.json"]


def make_client(folder: Path, data: Path, has: Callable[[dict], bool], local_epochs: int, **entries) -> MonaiAlgo:
    """A client with those training records that it has, and a folder of its own."""
    datalist = json.loads((data / "datalist.json").read_text())
    datalist["training"] = list(filter(has, datalist["training"]))
    folder.mkdir(exist_ok=True)
    (folder / "datalist.json").write_text(json.dumps(datalist))
    entries |= {"dataset_dir": str(data), "datalist": str(folder / "datalist.json"), "output_dir": str(folder)}
    entries |= {"max_epochs": 3 * local_epochs, "device": "cpu"}
    algo = MonaiAlgo(
        bundle_root=".",
        local_epochs=local_epochs,
        send_weight_diff=False,
        config_train_filename=CONFIGS,
        train_kwargs=dict(entries),
        config_evaluate_filename=CONFIGS,
        eval_kwargs=dict(entries),
        best_model_filepath=str(folder / "model.pt"),
    )
    algo.initialize(extra={ExtraItems.CLIENT_NAME: folder.name, ExtraItems.APP_ROOT: str(ROOT)})
    return algo


def average(updates: Sequence[dict]) -> dict:
    mean = {name: torch.stack([update[name].double() for update in updates]).mean(0) for name in updates[0]}
    return {name: value.to(updates[0][name].dtype) for name, value in mean.items()}


def equal(weights: dict, others: dict) -> bool:
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(autouse=True)
def root_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    yield
    set_determinism(None)


@pytest.fixture
def clients(tmp_path, phantom_dir):
    (tmp_path / "client0").mkdir()
    (tmp_path / "client0/last.pt").write_bytes(b"of an earlier federation")
    records = json.loads((phantom_dir / "datalist.json").read_text())["training"]
    patients = sorted({record["group"] for record in records})
    return [
        make_client(
            tmp_path / f"client{number}",
            phantom_dir,
            lambda record, mine=patients[number::2]: record["group"] in mine,
            local_epochs=2,
            batch_size=2,
            resume=number == 1,
        )
        for number in range(2)
    ]


def test_two_clients_average_their_weights_over_three_rounds(clients):
    shared, begun_with = deepcopy(clients[0].get_weights().weights), []
    for algo in clients:
        begin = lambda engine: begun_with.append((engine.state.epoch, deepcopy(engine.network.state_dict())))  # noqa: E731
        algo.trainer.add_event_handler(Events.EPOCH_STARTED, begin)
    for number in range(3):
        begun_with.clear()
        updates = []
        for algo in clients:
            algo.train(ExchangeObject(weights=shared), extra={})
            updates.append(deepcopy(algo.get_weights().weights))
        # Each goes on from the weights it was given, not from those it had.
        assert [epoch for epoch, _ in begun_with] == 2 * [2 * number + 1, 2 * number + 2]
        assert all(equal(begun_with[first][1], shared) for first in (0, 2))
        assert not equal(updates[0], updates[1]) and not equal(updates[0], shared)
        shared = average(updates)
    metrics = [algo.evaluate(ExchangeObject(weights=shared), extra={}).metrics for algo in clients]
    assert metrics[0] == pytest.approx(metrics[1], nan_ok=True) and 0 <= metrics[0]["score"] <= 1
    best = clients[1].get_weights(extra={ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert best.keys() == shared.keys()
    for algo in clients:
        algo.finalize()


CLASSIFY = {
    "tasks": {"classification": 1.0},
    "augmentation": {"_target_": "Compose", "transforms": []},
    "val_interval": 1000,
}


def draw_bars(folder: Path) -> Path:
    """A data set whose classes are easy to learn: in each a bar lies at another place of a noisy picture."""
    datalist = {"classes": ["other", "COVID-19", "lung cancer"], "training": [], "validation": []}
    random = np.random.default_rng(0)
    folder.mkdir()
    for split, label, number in itertools.product(("training", "validation"), range(3), range(16)):
        pixels = random.integers(0, 150, (64, 64), dtype=np.uint8)
        pixels[24:40, 4 + 20 * label :][:, :16] = 255
        name = f"{split}_{label}_{number}.png"
        Image.fromarray(pixels).save(folder / name)
        datalist[split].append({"image": name, "class": label})
    (folder / "datalist.json").write_text(json.dumps(datalist))
    return folder


def test_two_hospitals_that_each_lack_a_disease_do_better_together(tmp_path):
    """One sees COVID-19, the other cancer, both "other": alone, a hospital can name two of three classes."""
    data = draw_bars(tmp_path / "data")
    clients = [
        make_client(
            tmp_path / f"{own}",
            data,
            lambda record, own=own: record.get("class") in (0, own),
            local_epochs=4,
            learning_rate=0.002,
            seed=own,
            **CLASSIFY,
        )
        for own in (1, 2)
    ]
    begin = deepcopy(clients[0].get_weights().weights)

    def accuracy(members: Sequence[MonaiAlgo]) -> float:
        """Balanced accuracy after members have trained for three rounds, with the mean of their weights after each."""
        shared = begin
        for _ in range(3):
            for algo in members:
                algo.train(ExchangeObject(weights=shared), extra={})
            shared = average([deepcopy(algo.get_weights().weights) for algo in members])
        return members[0].evaluate(ExchangeObject(weights=shared), extra={}).metrics["classification_balanced_accuracy"]

    together, alone = accuracy(clients), [accuracy([algo]) for algo in clients]
    print(f"balanced accuracy together {together:.3f}, alone {alone[0]:.3f} and {alone[1]:.3f}")
    assert max(alone) < 0.7 and together > 0.9
