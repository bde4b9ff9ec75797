"""What an experiment is, and the file with the figures of all runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

from filelock import FileLock

from bundle.errors import UserError
from bundle.files import write_table
from bundle.training.history import STAGE_COLUMNS

# Figures of the tables: column -> where the report of an evaluation has it.
FIGURES = {**STAGE_COLUMNS, "sensitivity at 1 FP": ("detection", "froc", "1")}
ARM = ("experiment", "scale", "data", "arm", "seed")  # columns of the results that name a run
COLUMNS = (*ARM, "stage", "split", *FIGURES, "steps", "seconds", "date", "machine", "run", "intervals")


@dataclass(frozen=True)
class Experiment:
    """A comparison of arms under one budget.

    Args:
        name: of the file, without experiment_ and .json.
        title: one line.
        question: what it answers, and how it is to be read.
        workflow: `run`, one training with the tasks of the configuration, or `training`, the curriculum of its `stages`.
        settings: overlay files and entries, merged in order, of all arms.
        arms: name -> the same for the arm alone. The first arm is the one that the others are compared with. An arm that is
            {"members": […]} is an ensemble: for each network a list of overlay files and entries.
        seeds: of each arm; arms with the same seed are a pair.
        figures: columns of the table, names of `FIGURES`.
        curve: {"x": arm -> number, "label", "figure", "target"} for a learning curve, else empty.
        recipes: name -> overlay files and entries merged last. With recipes, every arm is run with each of them and is
            named "ARM, RECIPE".
        groups: of arms that one figure is compared in, each {"title", "figure", "arms"}; the page then has a column for each
            recipe, a row for each arm and the mean of each group. Needs recipes.
    """

    name: str
    title: str
    question: str
    workflow: str
    settings: Sequence
    arms: Mapping[str, Sequence | Mapping]
    seeds: Sequence[int]
    figures: Sequence[str]
    curve: Mapping
    recipes: Mapping[str, Sequence] = field(default_factory=dict)
    groups: Sequence[Mapping] = ()

    @classmethod
    def read(cls, name: str, config_dir) -> Experiment:
        """Read `config_dir`/experiment_NAME.json, or the file `name` if it ends in .json.

        `workflow` (run), `settings`, `curve`, `recipes` and `groups` (none) may be absent.

        Raises:
            UserError: if there is no such file, naming those there are.
            UserError: if an entry is missing, unknown, empty or of the wrong kind.
        """
        path = Path(name) if name.endswith(".json") else Path(config_dir) / f"experiment_{name}.json"
        if not path.is_file():
            raise UserError(f"experiment: found {name!r}, expected one of {', '.join(experiment_names(config_dir))}")
        absent = {"workflow": "run", "settings": [], "curve": {}, "recipes": {}, "groups": []}
        entries = {**absent, **json.loads(path.read_text())}
        expected = {field.name for field in fields(cls)} - {"name"}
        if entries.keys() != expected:
            raise UserError(f"{path}: found {', '.join(sorted(entries))}, expected {', '.join(sorted(expected))}")
        experiment = cls(name=path.stem.removeprefix("experiment_"), **entries)
        for complaint in experiment._complaints():
            raise UserError(f"{path}: {complaint}")
        return replace(experiment, arms=experiment._arms_of_recipes()) if experiment.recipes else experiment

    def _arms_of_recipes(self) -> dict[str, list]:
        recipes, arms = self.recipes.items(), self.arms.items()
        return {f"{arm}, {recipe}": [*parts, *changes] for recipe, changes in recipes for arm, parts in arms}

    def _complaints(self):
        if self.workflow not in ("run", "training"):
            yield f"workflow: found {self.workflow!r}, expected run or training"
        for name in ("arms", "seeds", "figures"):
            if not getattr(self, name):
                yield f"{name}: found none, expected one or more"
        if unknown := set(self.figures) - set(FIGURES):
            yield f"figures: found {', '.join(sorted(unknown))}, expected some of {', '.join(FIGURES)}"
        for arm, content in self.arms.items():
            members = content.get("members") if isinstance(content, Mapping) and len(content) == 1 else [content]
            if not members or not all(isinstance(member, list) for member in members):
                yield f"arms::{arm}: found {content!r}, expected a list of overlays, or {{'members': one or more such lists}}"
            elif len(members) > 1 and self.workflow == "training":
                yield f"arms::{arm}: found members, expected none with the workflow training: an ensemble is of single trainings"
            elif isinstance(content, Mapping) and self.recipes:
                yield f"arms::{arm}: found members, expected none with recipes, which change single networks"
        if self.curve:
            yield from self._complaints_of_curve()
        for group in self.groups:
            if not isinstance(group, Mapping) or group.keys() != {"title", "figure", "arms"}:
                yield f"groups: found {group!r}, expected title, figure and arms of each"
            elif group["figure"] not in self.figures or not set(group["arms"]) <= set(self.arms) or not self.recipes:
                yield f"groups: found {group!r}, expected one of `figures`, some of `arms`, and `recipes`"

    def _complaints_of_curve(self):
        keys = {"x", "label", "figure", "target"}
        if not isinstance(self.curve, Mapping) or self.curve.keys() != keys:
            yield f"curve: found {', '.join(sorted(map(str, self.curve)))}, expected {', '.join(sorted(keys))}"
        elif not isinstance(self.curve["x"], Mapping) or set(self.curve["x"]) != set(self.arms):
            yield f"curve::x: found {', '.join(map(str, self.curve['x']))}, expected the arms {', '.join(self.arms)}"
        elif not all(isinstance(amount, (int, float)) and amount > 0 for amount in self.curve["x"].values()):
            yield f"curve::x: found {list(self.curve['x'].values())}, expected amounts above 0"
        elif self.curve["figure"] not in FIGURES:
            yield f"curve::figure: found {self.curve['figure']!r}, expected one of {', '.join(FIGURES)}"
        elif not isinstance(self.curve["target"], float) or not 0 < self.curve["target"] < 1:
            yield f"curve::target: found {self.curve['target']!r}, expected a figure between 0 and 1"

    def members(self, arm: str) -> list[Sequence]:
        """The networks of an arm, each as a list of overlay files and entries; one for all but ensembles."""
        content = self.arms[arm]
        return list(content["members"]) if isinstance(content, Mapping) else [content]


def experiment_names(config_dir) -> list[str]:
    """Names of the experiments in a folder."""
    return sorted(path.stem.removeprefix("experiment_") for path in Path(config_dir).glob("experiment_*.json"))


def read_results(path) -> list[dict[str, str]]:
    """Rows of a results file, a cell without a figure empty; no row if there is no file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_arm(rows: Iterable[Mapping]) -> dict[tuple[str, ...], list[Mapping]]:
    """Rows of results by the values of `ARM`, in the order of the rows."""
    arms = {}
    for row in rows:
        arms.setdefault(tuple(str(row[name]) for name in ARM), []).append(row)
    return arms


def add_results(path, rows: Sequence[Mapping]) -> None:
    """Write rows into a results file, each arm (`ARM`) in its old place or at the end; others may do so at the same time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        arms = {**by_arm(read_results(path)), **by_arm(rows)}
        write_table(chain.from_iterable(arms.values()), path, COLUMNS)
