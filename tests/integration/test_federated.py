"""MONAI's client for federated learning drives the bundle as it is."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.utils import set_determinism

ROOT = Path(__file__).parents[2]
CONFIGS = ["configs/train.json", "configs/preset_smoke.json"]


def client(folder: Path, phantom_dir: Path, number: int, count: int = 2) -> MonaiAlgo:
    """A client with every n-th patient of the training data."""
    datalist = json.loads((phantom_dir / "datalist.json").read_text())
    patients = sorted({record["group"] for record in datalist["training"]})[number::count]
    datalist["training"] = [record for record in datalist["training"] if record["group"] in patients]
    file = folder / f"{number}.json"
    file.write_text(json.dumps(datalist))
    entries = {"dataset_dir": str(phantom_dir), "datalist": str(file), "output_dir": str(folder / f"client{number}")}
    entries |= {"max_epochs": 6, "batch_size": 2, "device": "cpu", "resume": number == 1}
    algo = MonaiAlgo(
        bundle_root=".",
        local_epochs=2,
        send_weight_diff=False,
        config_train_filename=CONFIGS,
        train_kwargs=dict(entries),
        config_evaluate_filename=CONFIGS,
        eval_kwargs=dict(entries),
        best_model_filepath=str(folder / f"client{number}/model.pt"),
    )
    algo.initialize(extra={ExtraItems.CLIENT_NAME: f"client{number}", ExtraItems.APP_ROOT: str(ROOT)})
    return algo


def equal(weights: dict, others: dict) -> bool:
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture
def clients(tmp_path, phantom_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "client0").mkdir()
    (tmp_path / "client0/last.pt").write_bytes(b"of an earlier federation")
    yield [client(tmp_path, phantom_dir, number) for number in range(2)]
    set_determinism(None)


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
        shared = {name: torch.stack([update[name].double() for update in updates]).mean(0) for name in shared}
        shared = {name: value.to(updates[0][name].dtype) for name, value in shared.items()}
    metrics = [algo.evaluate(ExchangeObject(weights=shared), extra={}).metrics for algo in clients]
    assert metrics[0] == pytest.approx(metrics[1], nan_ok=True) and 0 <= metrics[0]["score"] <= 1
    best = clients[1].get_weights(extra={ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert best.keys() == shared.keys()
    for algo in clients:
        algo.finalize()
