"""What an experiment is, and the file with the figures of all runs."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

from filelock import FileLock

from bundle.config import check_schema
from bundle.errors import UserError
from bundle.files import write_table
from bundle.training.history import STAGE_COLUMNS

# Figures of the tables: column -> where the report of an evaluation has it.
FIGURES = {**STAGE_COLUMNS, "sensitivity at 1 FP": ("detection", "froc", "1")}
ARM = ("experiment", "scale", "data", "arm", "seed")  # columns of the results that name a run
COLUMNS = (*ARM, "stage", "split", *FIGURES, "steps", "seconds", "date", "machine", "run", "intervals")
SCHEMA = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
SCHEMA["$defs"]["figure"] = {"enum": [*FIGURES]}


@dataclass(frozen=True)
class Experiment:
    """A comparison of arms under one budget; docs/experiments.md describes the entries of its file, experiment_`name`.json.

    With recipes every arm is run with each of them, whose overlays are merged last, and is then named "ARM, RECIPE".
    """

    name: str
    title: str
    question: str
    arms: Mapping[str, Sequence | Mapping]
    seeds: Sequence[int]
    figures: Sequence[str]
    workflow: str = "run"
    settings: Sequence = ()
    curve: Mapping = field(default_factory=dict)
    recipes: Mapping[str, Sequence] = field(default_factory=dict)
    groups: Sequence[Mapping] = ()

    @classmethod
    def read(cls, name: str, config_dir) -> "Experiment":
        """Read `config_dir`/experiment_NAME.json, or the file `name` if it ends in .json."""
        path = Path(name) if name.endswith(".json") else Path(config_dir) / f"experiment_{name}.json"
        if not path.is_file():
            raise UserError(f"experiment: found {name!r}, expected one of {', '.join(experiment_names(config_dir))}")
        entries = json.loads(path.read_text(encoding="utf-8"))
        known = [entry.name for entry in fields(cls)][1:]
        if not set(known[:5]) <= entries.keys() <= set(known):
            found, needed = ", ".join(sorted(entries)), ", ".join(known[:5])
            raise UserError(f"{path}: found {found}, expected {needed}, and any of {', '.join(known[5:])}")
        check_schema(entries, SCHEMA, f"{path}: ")
        experiment = cls(path.stem.removeprefix("experiment_"), **entries)
        for complaint in experiment._complaints():
            raise UserError(f"{path}: {complaint}")
        arms, recipes = experiment.arms.items(), experiment.recipes.items()
        with_recipes = {f"{arm}, {name}": [*parts, *changes] for name, changes in recipes for arm, parts in arms}
        return replace(experiment, arms=with_recipes or experiment.arms)

    def _complaints(self) -> Iterator[str]:
        """What a schema cannot say."""
        names, single = ", ".join(self.arms), self.workflow == "training" or self.recipes
        for arm, content in self.arms.items():
            if single and isinstance(content, Mapping):
                yield f"arms::{arm}: found members, expected none with recipes or the workflow training"
        if self.curve and self.curve["x"].keys() != self.arms.keys():
            yield f"curve::x: found {', '.join(self.curve['x'])}, expected the arms {names}"
        for group in self.groups:
            if not set(group["arms"]) <= self.arms.keys() or not self.recipes:
                yield f"groups: found {', '.join(group['arms'])}, expected some of {names}, and one or more recipes"

    def members(self, arm: str) -> list[Sequence]:
        """The networks of an arm, each as a list of overlay files and entries; one for all but ensembles."""
        content = self.arms[arm]
        return list(content["members"]) if isinstance(content, Mapping) else [content]


def experiment_names(config_dir) -> list[str]:
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
    """Write rows into a results file, each arm in its old place or at the end; other processes may do so at the same time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        arms = {**by_arm(read_results(path)), **by_arm(rows)}
        write_table(chain.from_iterable(arms.values()), path, COLUMNS)
