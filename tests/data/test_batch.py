import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from bundle.data.batch import balanced_weights, collate
from bundle.names import TASKS


def sample(**annotations):
    return {"image": torch.rand(1, 8, 8), "record": {"image": "x", "group": "g", "source": "s"}, **annotations}


def test_collate_joins_partially_labelled_samples():
    boxes, masks = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 8, 8, dtype=torch.uint8)
    batch = collate(
        [
            sample(**{"class": 2}),
            sample(mask=torch.ones(2, 8, 8)),
            sample(boxes=boxes, instances=masks),
            sample(boxes=boxes[:0]),
            sample(target=torch.zeros(1, 8, 8)),
        ]
    )
    assert batch["image"].shape == batch["target"].shape == (5, 1, 8, 8)
    assert batch["mask"].shape == (5, 2, 8, 8) and batch["mask"].sum((1, 2, 3)).tolist() == [0, 128, 0, 0, 0]
    assert batch["class"].tolist() == [2, 0, 0, 0, 0]
    assert {task: rows.tolist() for task, rows in batch["annotated"].items()} == {
        "classification": [True, False, False, False, False],
        "segmentation": [False, True, False, False, False],
        "detection": [False, False, True, True, False],
        "reconstruction": [True] * 5,
    }
    assert [target is None for target in batch["detection"]] == [True, True, False, False, True]
    assert batch["detection"][2]["labels"].tolist() == [1] and "masks" not in batch["detection"][3]
    torch.testing.assert_close(batch["target"][0], batch["image"][0])
    assert batch["target"][4].sum() == 0


RECORDS = (
    [{"class": 0, "source": "a"}] * 40
    + [{"class": 1, "source": "a"}] * 4
    + [{"class": 2, "source": "b"}] * 2
    + [{"mask": "m.png", "source": "c"}] * 3
    + [{"boxes": [], "source": "d"}] * 20
    + [{"boxes": [[0, 0, 1, 1]], "source": "d"}] * 5
    + [{"source": "e"}] * 50
)


def test_every_task_source_and_class_has_its_share():
    weights = balanced_weights(RECORDS, ("classification", "segmentation", "detection"))
    shares = {}
    for record, weight in zip(RECORDS, weights.tolist()):
        key = record["source"], record.get("class"), len(record.get("boxes", []))
        shares[key] = shares.get(key, 0) + weight
    expected = {("a", 0, 0): 1 / 12, ("a", 1, 0): 1 / 12, ("b", 2, 0): 1 / 6, ("c", None, 0): 1 / 3}
    expected |= {("d", None, 0): 1 / 6, ("d", None, 1): 1 / 6, ("e", None, 0): 0}
    assert shares == pytest.approx(expected)


def test_reconstruction_reaches_unlabelled_records_and_draws_repeat():
    weights = balanced_weights(RECORDS, TASKS)
    assert (weights > 0).all() and weights.sum() == pytest.approx(1)
    draws = [list(WeightedRandomSampler(weights, 50, generator=torch.Generator().manual_seed(3))) for _ in range(2)]
    assert draws[0] == draws[1]
