"""From a scan to its result, and from a list of scans to folders of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ignite.engine import Events
from monai.engines import Evaluator
from tqdm import tqdm

from bundle.data.volumes import Scan
from bundle.inference.results import Collector, Result
from bundle.inference.slices import slices_of
from bundle.inference.worklist import Worklist
from bundle.inference.writer import write_result
from bundle.networks import Novelty
from bundle.tasks import Task


class Predictor:
    """Predict a scan: `predictor(scan)` gives its `Result`.

    Args:
        evaluator: of configs/inference.json, whose batches are single slices when an iteration is completed.
        tasks: that are answered.
        novelty: distance from the training data, or None where that is not known.
    """

    def __init__(self, evaluator: Evaluator, tasks: Sequence[Task], novelty: Novelty | None = None) -> None:
        self.evaluator, self.novelty = evaluator, novelty
        self.tasks = list(tasks)
        evaluator.interrupt_resume_enabled = False  # after an error ignite would resume the run that failed

    def __call__(self, scan: Scan) -> Result:
        """Run the evaluator over the slices of a scan.

        Raises:
            UserError: if a slice cannot be read, perhaps as the cause of another exception.
        """
        collector, loader = Collector(scan, self.tasks, self.novelty), self.evaluator.data_loader
        loader.dataset.data = slices_of([scan])
        self.evaluator.state.epoch_length = len(loader)

        def collect(engine) -> None:
            for sample, answer in zip(engine.state.batch, engine.state.output, strict=True):
                collector.add(sample, answer)

        with self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, collect):
            self.evaluator.run()
        return collector.finish()


def predict_scans(worklist: Worklist, predictor: Predictor, model: Mapping[str, str], keep_identifiers: bool = False) -> None:
    """Predict all scans of a worklist and write their results and the tables.

    Args:
        worklist: gives the scans and their folders, and takes the failures.
        predictor: of scans.
        model, keep_identifiers: see `write_result`.

    Raises:
        UserError: if another run has the folder of the results, or if nothing at all could be predicted.
    """
    with worklist.locked():
        pending = worklist.pending()
        for scan in tqdm(pending, "scans", disable=None if len(pending) > 1 else True):
            with worklist.attempt(scan) as folder:
                write_result(predictor(scan), folder, model, worklist.stamp(scan), keep_identifiers)
        worklist.finish(predictor.tasks)
