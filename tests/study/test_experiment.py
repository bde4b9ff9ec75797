"""What an experiment may say, and the file that keeps the figures of runs."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bundle.errors import UserError
from bundle.study.experiment import COLUMNS, Experiment, add_results, experiment_names, read_results

CONFIGS = Path(__file__).parents[2] / "configs"
CURVE = {"x": {"one": 1, "two": 2}, "label": "n", "figure": "Dice", "target": 0.8}
ENTRIES = {"title": "A", "question": "b?", "arms": {"one": [], "two": [{"seed": 1}]}, "seeds": [0], "figures": ["Dice"]}
GROUP = {"title": "G", "figure": "Dice", "arms": ["one", "two"]}


def write(folder, **entries):
    (folder / "experiment_x.json").write_text(json.dumps({**ENTRIES, **entries}))
    return folder


def test_an_experiment_is_read_with_its_defaults(tmp_path):
    experiment = Experiment.read("x", write(tmp_path))
    assert (experiment.name, experiment.workflow, experiment.settings, experiment.curve) == ("x", "run", (), {})
    assert experiment.members("two") == [[{"seed": 1}]]
    ensemble = Experiment.read("x", write(tmp_path, arms={"both": {"members": [["a.json"], []]}}))
    assert ensemble.members("both") == [["a.json"], []]
    assert Experiment.read("x", write(tmp_path, curve=CURVE)).curve == CURVE


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"arms": {}}, "arms: found {}, expected one or more"),
        ({"figures": []}, "figures: found [], expected one or more"),
        ({"figures": ["dice"]}, "figures::0: found 'dice', expected one of accuracy, AUROC, Dice"),
        ({"workflow": "train"}, "workflow: found 'train', expected one of run, training"),
        ({"arms": {"one": {}}}, "arms::one: found {}, expected a list of overlays, or {'members': one or more such lists}"),
        ({"arms": {"one": {"members": []}}}, "arms::one: found {'members': []}, expected a list of overlays"),
        ({"arms": {"one": {"members": ["a.json"]}}}, "arms::one: found {'members': ['a.json']}, expected a list of overlays"),
        ({"workflow": "training", "arms": {"one": {"members": [[], []]}}}, "arms::one: found members, expected none with"),
        ({"recipes": {"r": []}, "arms": {"one": {"members": [[]]}}}, "arms::one: found members, expected none with recipes"),
        ({"curve": {"x": {"one": 1, "two": 2}}}, "expected x, label, figure and target, or nothing"),
        ({"curve": {**CURVE, "x": {"one": 1}}}, "curve::x: found one, expected the arms one, two"),
        ({"curve": {**CURVE, "x": {"one": 0, "two": 1}}}, "curve::x::one: found 0, expected a number above 0"),
        ({"curve": {**CURVE, "target": 80}}, "curve::target: found 80, expected a figure between 0 and 1"),
        ({"groups": [GROUP]}, "groups: found one, two, expected some of one, two, and one or more recipes"),
        ({"recipes": {"r": []}, "groups": [{**GROUP, "arms": ["three"]}]}, "groups: found three, expected some of one, two"),
        ({"recipes": {"r": []}, "groups": [{"title": "G"}]}, "groups::0: found {'title': 'G'}, expected title, figure and arms"),
        ({"seed": 0}, "found arms, figures, question, seed, seeds, title, expected title, question, arms, seeds, figures, and any"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_refused_in_one_line(tmp_path, entries, words):
    with pytest.raises(ValueError) as caught:
        Experiment.read("x", write(tmp_path, **entries))
    assert str(caught.value).startswith(f"{tmp_path}/experiment_x.json: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_arm_is_run_with_every_recipe(tmp_path):
    recipes = {"plain": [], "long": ["preset_cpu.json", {"seed": 2}]}
    path = write(tmp_path, recipes=recipes, groups=[GROUP]) / "experiment_x.json"
    experiment = Experiment.read(str(path), "elsewhere")
    assert experiment.name == "x" and list(experiment.arms) == ["one, plain", "two, plain", "one, long", "two, long"]
    assert experiment.members("two, long") == [[{"seed": 1}, "preset_cpu.json", {"seed": 2}]]


def test_a_missing_experiment_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="experiment: found 'y', expected one of x"):
        Experiment.read("y", write(tmp_path))


def test_every_experiment_of_the_study_can_be_read():
    names = experiment_names(CONFIGS)
    assert len(names) >= 10 and all(Experiment.read(name, CONFIGS).arms for name in names)


def test_results_are_replaced_run_by_run(tmp_path):
    def row(arm, seed, dice):
        place = {"experiment": "x", "scale": "smoke", "data": "d", "stage": "end"}
        return {**place, "arm": arm, "run": arm, "seed": seed, "Dice": dice}

    path = tmp_path / "new/results.csv"
    assert read_results(path) == []
    add_results(path, [row("one", 0, 0.1), row("one", 0, 0.2)])
    add_results(path, [row("two", 0, 0.3)])
    add_results(path, [row("one", 1, 0.4)])
    add_results(path, [row("one", 0, 0.5)])  # in place of both its rows, where they stood
    rows = read_results(path)
    assert tuple(rows[0]) == COLUMNS and [float(row["Dice"]) for row in rows] == [0.5, 0.3, 0.4]
    assert {row["AUROC"] for row in rows} == {""}
    assert {file.name for file in path.parent.iterdir()} == {"results.csv", "results.csv.lock"}


def test_what_several_commands_add_at_a_time_is_all_there(tmp_path):
    rows = [{"experiment": "x", "scale": "smoke", "data": "d", "arm": str(arm), "seed": 0} for arm in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: add_results(tmp_path / "results.csv", [row]), rows))
    assert {row["arm"] for row in read_results(tmp_path / "results.csv")} == {row["arm"] for row in rows}
