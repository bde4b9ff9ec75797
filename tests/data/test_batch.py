import pytest
import torch
from some_tasks import some_tasks
from torch.utils.data import WeightedRandomSampler

from bundle.data.batch import balanced_weights, collate
from bundle.errors import UserError
from bundle.tasks.classification import known_classes


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
        ],
        some_tasks(segmentation_classes=["ground glass", "consolidation"]),
    )
    assert batch["image"].shape == batch["target"].shape == (5, 1, 8, 8)
    assert batch["mask"].shape == (5, 2, 8, 8) and batch["mask"].sum((1, 2, 3)).tolist() == [0, 128, 0, 0, 0]
    assert batch["class"].tolist() == [[False, False, True], *[[False] * 3] * 4]
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


def test_a_class_known_in_part_is_a_set_of_candidates():
    batch = collate([sample(**{"class": [0, 2]}), sample(**{"class": 1}), sample()], some_tasks("classification"))
    assert batch["class"].tolist() == [[True, False, True], [False, True, False], [False, False, False]]
    assert batch["annotated"]["classification"].tolist() == [True, True, False]
    assert not {"mask", "detection"} & batch.keys(), "what no task needs"
    rows, classes = known_classes(batch)
    assert rows.tolist() == [False, True, False] and classes.tolist() == [1]


RECORDS = (
    [{"class": 0, "source": "a"}] * 40
    + [{"class": 1, "source": "a"}] * 3
    + [{"class": [0, 1], "source": "a"}] * 2
    + [{"class": 2, "source": "b"}] * 2
    + [{"mask": "m.png", "source": "c"}] * 3
    + [{"mask": "m.png", "source": "d"}] * 30
    + [{"mask": "empty", "source": "d"}] * 20
    + [{"boxes": [[0, 0, 1, 1]], "source": "e"}] * 5
    + [{"source": "f"}] * 50
)


def shares_of(weights):
    """Share of the draws by source, class, mask and boxes."""
    shares = {}
    for record, weight in zip(RECORDS, weights.tolist()):
        key = record["source"], *(str(record[field])[:5] for field in ("class", "mask", "boxes") if field in record)
        shares[key] = shares.get(key, 0) + weight
    return shares


def test_sources_and_classes_and_slices_with_and_without_lesion_have_their_shares():
    expected = {("a", "0"): 1 / 18, ("a", "1"): 1 / 18, ("a", "[0, 1"): 1 / 9, ("b", "2"): 1 / 9}  # in part: one stratum
    expected |= {("c", "m.png"): 1 / 12, ("d", "m.png"): 1 / 12, ("d", "empty"): 1 / 6}  # halves first, then sources
    expected |= {("e", "[[0, "): 1 / 3, ("f",): 0}  # no slice without a box: the half goes to the others
    weights = balanced_weights(RECORDS, some_tasks("classification", "segmentation", "detection"))
    assert shares_of(weights) == pytest.approx(expected)


def test_reconstruction_has_a_share_of_the_records_without_another_annotation_alone():
    shares = shares_of(balanced_weights(RECORDS, some_tasks()))
    assert shares["f",] == pytest.approx(1 / 4) and shares["b", "2"] == pytest.approx(1 / 12)
    annotated = [record for record in RECORDS if len(record) > 1]
    assert torch.equal(*(balanced_weights(annotated, some_tasks(draws={"reconstruction": n})) for n in (1, 5)))
    shares = shares_of(balanced_weights(RECORDS, some_tasks("reconstruction")))
    assert shares["f",] == pytest.approx(1 / 6) and shares["a", "0"] == pytest.approx(1 / 6 * 40 / 45), "alone: by source"


def test_shares_of_the_tasks_are_a_knob():
    draws = {"classification": 3, "detection": 1, "reconstruction": 0, "segmentation": 7}
    shares = shares_of(balanced_weights(RECORDS, some_tasks("classification", "reconstruction", "detection", draws=draws)))
    assert shares["b", "2"] == pytest.approx(3 / 12) and shares["e", "[[0, "] == pytest.approx(1 / 4)
    assert shares["f",] == shares["c", "m.png"] == 0
    with pytest.raises(UserError, match="draws: found boxes, expected names of tasks: classification, segmentation"):
        some_tasks(draws={"boxes": 1})
    with pytest.raises(UserError, match="draws: found no record to draw for segmentation, expected a share above 0"):
        balanced_weights(RECORDS, some_tasks("segmentation", draws={"segmentation": 0}))


def test_a_source_does_not_stand_for_a_class():
    """Single sources are drawn for a class only where no source shows it beside others; what is known in part is drawn."""
    classes = {"both": (0, 1), "sick": (1,), "sick, some unsure": (1, [0, 1]), "cancer": (2,), "nodules": ([0, 2],)}
    classes |= {"sick or not": (1, [0, 2])}  # two sides of class 1
    records = [{"source": source, "class": label} for source, labels in classes.items() for label in labels]
    weights = balanced_weights(records, some_tasks("classification")).tolist()
    drawn = dict(zip([(record["source"], str(record["class"])) for record in records], weights))
    assert [key for key, share in drawn.items() if not share] == [("sick", "1"), ("sick, some unsure", "1")]
    assert drawn["both", "0"] == drawn["both", "1"] == drawn["cancer", "2"] / 2 == pytest.approx(1 / 8)
    assert drawn["sick or not", "1"] == pytest.approx(1 / 4)
    assert sum(share for (_, label), share in drawn.items() if "[" in label) == pytest.approx(1 / 4)
    alone = [{"source": "a", "class": 0}, {"source": "b", "class": 1}]
    assert balanced_weights(alone, some_tasks("classification")).tolist() == [0.5, 0.5], "no source shows two classes"


def test_draws_repeat():
    weights = balanced_weights(RECORDS, some_tasks())
    assert (weights > 0).all() and weights.sum() == pytest.approx(1)
    draws = [list(WeightedRandomSampler(weights, 50, generator=torch.Generator().manual_seed(3))) for _ in range(2)]
    assert draws[0] == draws[1]
