"""Intervals and fits are those of the library, and a report says what the rows say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bundle.study import Study
from bundle.study.experiment import COLUMNS, Experiment, read_results
from bundle.study.report import fit_power_law, mean_with_interval, write_report

ROOT = Path(__file__).parents[2]


def make(curve=None, arms=("one", "two")):
    return Experiment("x", "Title", "Question?", dict.fromkeys(arms, []), [0, 1, 2], ["Dice", "AUROC"], curve=curve or {})


def row(arm, seed, dice, stage="end", **more):
    cells = {"arm": arm, "seed": str(seed), "stage": stage, "Dice": str(dice), "steps": "48", "seconds": "60"}
    cells |= {"scale": "smoke", "date": "2026-01-01", "data": "merged", "machine": "a machine"}
    return {**dict.fromkeys(COLUMNS, ""), **cells, **more}


def test_interval_is_students():
    mean, low, high = mean_with_interval([0.1, 0.2, 0.3])
    # t(0.975, 2 degrees of freedom) = 4.3027; standard error 0.1 / sqrt(3)
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 0.24842, 0.2 + 0.24842), abs=1e-4)
    assert mean_with_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    mean, *edges = mean_with_interval([0.4])
    assert mean == 0.4 and np.isnan(edges).all()


def test_report_compares_arms_seed_by_seed(tmp_path):
    rows = [row("one", seed, 0.2 + 0.1 * seed) for seed in range(3)] + [row("two", seed, 0.3 + 0.1 * seed) for seed in range(3)]
    path = write_report(make(), rows, tmp_path / "results")
    text = path.read_text()
    command = "    python scripts/run_experiments.py x --dataset_dir merged --scale smoke\n"
    assert text.startswith(f"# Title\n\nQuestion?\n\n{command}") and "\n- a machine\n" in text
    assert "6 runs of 48 optimiser steps, seeds 0, 1, 2, 0.1 hours of wall time" in text
    assert "| one | 0.300 (0.052 to 0.548) | - |" in text
    # The arms differ by 0.1 with every seed: no uncertainty, whatever the seeds do to both.
    assert "| two | +0.100 (+0.100 to +0.100) | - |" in text.split("Difference from “one”")[1]
    assert "| one |" not in text.split("Difference from “one”")[1]
    assert Image.open(path.parent / "x.png").size[0] > 400
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.md", "x.png"]


def test_a_difference_needs_the_same_seed_in_both(tmp_path):
    text = write_report(make(), [row("one", 0, 0.2), row("two", 1, 0.9)], tmp_path).read_text()
    assert "| two | - | - |" in text.split("Difference from “one”")[1]
    assert "seeds 0, 1 (one: 0; two: 1), " in text
    assert "a single one" in write_report(make(), [row("one", 0, 0.2)], tmp_path).read_text()


def test_stages_are_reported_in_their_order(tmp_path):
    rows = [row("one", 0, 0.5)]
    rows += [row("one", seed, dice, "stage_segmentation") for seed, dice in ((0, 0.4), (1, 0.6))]
    rows += [row("one", 0, "", "stage_detection")]
    text = write_report(make(arms=["one"]), rows, tmp_path).read_text()
    assert "| one | segmentation | 0.500 | - |\n| one | detection | - | - |\n" in text


def test_power_law_is_found_again():
    x = [50, 100, 400, 1600]
    assert fit_power_law(x, [1 - 2 * n**-0.3 for n in x]) == pytest.approx((2, 0.3), rel=1e-4)
    assert fit_power_law(x, [0.5, 0.4, 0.3, 0.2]) is None  # more data, lower score


def test_learning_curve_says_how_much_is_needed(tmp_path):
    curve = {"x": {"one": 100, "two": 400}, "label": "number of images", "figure": "Dice", "target": 0.8}
    rows = [row(arm, seed, round(1 - 2 * n**-0.3, 6)) for arm, n in (("one", 100), ("two", 400)) for seed in range(2)]
    text = write_report(make(curve), rows, tmp_path).read_text()
    # 2 n^-0.3 = 0.2: n = 10^(1 / 0.3) = 2154
    assert "reaches 0.8 at n = 2,154 (fitted seed by seed: 2,154 to 2,154), 5.4 times the largest n" in text
    assert "Difference" not in text
    never = [row("one", 2, 0.5), row("two", 2, 0.45)]
    text = write_report(make(curve), rows + never, tmp_path).read_text()
    assert "(fitted seed by seed: 2,154 to more than 1000 times the largest n)" in text and "\n- 6 runs" in text
    text = write_report(make(curve), [*rows, row("one", 2, 0.4976)], tmp_path).read_text()
    assert "(fitted seed by seed: 2,154 to 2,154)" in text, "a seed without all arms has no curve of its own"
    flat, falling = [row("one", 0, 0.1081), row("two", 0, 0.1082)], [row("one", 0, 0.5), row("two", 0, 0.3)]
    text = write_report(make(curve), flat, tmp_path).read_text()
    assert "More than 1000 times the largest n would be needed for 0.8: flat" in text
    text = write_report(make(curve), falling, tmp_path).read_text()
    assert "No falling power law fits 1 - Dice over the number of images." in text


def test_groups_compare_recipes_on_the_sources_left_out(tmp_path):
    groups = [{"title": "Lesions", "figure": "Dice", "arms": ["a", "b"]}, {"title": "Classes", "figure": "AUROC", "arms": ["b"]}]
    experiment = replace(make(arms=["a, r", "b, r", "a, s", "b, s"]), recipes={"r": [], "s": []}, groups=groups)
    rows = [row("a, r", 0, 0.2, split="left_out", intervals='{"Dice": [0.1, 0.3]}'), row("b, r", 0, 0.6, split="left_out")]
    text = write_report(experiment, [*rows, row("b, s", 0, 0.5, AUROC="0.9")], tmp_path).read_text()
    table = text[text.index("| left out") :].splitlines()
    assert table[0] == "| left out | figure | r | s |" and table[2:] == [
        "| a | Dice | 0.200 (0.100 to 0.300) | - |",
        "| b | Dice | 0.600 | 0.500 |",
        "| **Lesions**, mean of 2 | Dice | 0.400 | - |",
        "| b | AUROC | - | 0.900 |",
        "| **Classes**, mean of 1 | AUROC | - | 0.900 |",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["x.md"]


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="experiment x: found no result, expected at least one run; run it first"):
        write_report(make(), [], tmp_path)


def test_the_pages_say_what_the_results_say(tmp_path):
    path, configs = ROOT / "docs/results/results.csv", ROOT / "configs"
    results = read_results(path)
    names = {row["experiment"] for row in results}
    assert names and {path.stem for path in (ROOT / "docs/results").glob("*.md")} == names | {"README"}
    for name in names:
        experiment = Experiment.read(name, configs)
        scale, data = next((row["scale"], row["data"]) for row in results if row["experiment"] == name)
        study = Study(configs, scale, {"dataset_dir": data}, tmp_path, path)
        rows = study.rows(experiment)
        assert rows == [row for row in results if row["experiment"] == name], "made by what the configs say now"
        page = write_report(experiment, rows, tmp_path)
        assert page.read_text() == (ROOT / "docs/results" / page.name).read_text(), f"run_experiments.py {name} --report"
