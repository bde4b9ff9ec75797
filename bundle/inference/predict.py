"""From a scan to its result, and from a list of scans to folders of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import Evaluator
from monai.utils.enums import CommonKeys

from bundle.config import check_config, merge_overlays
from bundle.data.volumes import Scan
from bundle.errors import UserError, user_message
from bundle.files import ROOT, text_hash
from bundle.inference.inputs import as_scan
from bundle.inference.results import Result
from bundle.inference.slices import SAMPLES, helper, slices_of, to_cpu
from bundle.inference.worklist import Worklist
from bundle.networks import Novelty
from bundle.tasks import Task


class Model:
    """The network with everything around it, as configs/inference.json makes it: `Model.load().predict(scan)`.

    Without `novelty` the distance from the training data is not known. With `keep_identifiers` predictions.json has the names and
    ids of DICOM headers.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        postprocessing: Callable[[dict], dict],
        tasks: Sequence[Task],
        novelty: Novelty | None = None,
        name: Mapping[str, str] | None = None,
        fingerprint: str = "",
        keep_identifiers: bool = False,
    ) -> None:
        self.evaluator, self.postprocessing, self.tasks, self.novelty = evaluator, postprocessing, list(tasks), novelty
        self.name, self.fingerprint, self.keep_identifiers = dict(name or {}), fingerprint, keep_identifiers
        self._lock = Lock()
        evaluator.interrupt_resume_enabled = False  # after an error ignite would resume the run that failed

    @classmethod
    def load(cls, checkpoint=None, config: Sequence = (), **knobs) -> Model:
        """Make a model by configs/inference.json; random numbers, logging and threads stay as they are.

        Args:
            checkpoint: path of weights; by default those of this package.
            config: paths of overlays on configs/inference.json.
            **knobs: of docs/configuration.md, such as `flips=False`, `device="cuda"` or `tasks={"segmentation": 1.0}`.

        Raises:
            UserError: in one line, if there are no such weights, or for an unknown or impossible knob.
        """
        if unused := knobs.keys() & {"input", "dataset_dir", "output_dir"}:
            raise UserError(f"{', '.join(unused)}: a knob of the command; pass the scan to `predict` and the folder to `save`")
        root = Path(knobs.pop("bundle_root", None) or ROOT)
        with _undisturbed():
            parser = ConfigParser(merge_overlays(root / "configs/inference.json", config))
            parser.update({**knobs, "bundle_root": str(root)})
            if checkpoint is not None:
                parser["checkpoint"] = Path(checkpoint)  # no text, in which some characters have a meaning
            check_config(parser.get(), "inference")
            parser["input"], parser["workflow"] = None, SimpleNamespace(parser=parser)  # MONAI's runner makes a workflow
            parser.get_parsed_content("load")
            return parser.get_parsed_content("predictor")

    def predict(self, source, spacing: Sequence[float] | None = None, window: Sequence[float] | None = None) -> Result:
        """Predict one scan; nothing is written.

        Args:
            source: path of a slice, a picture, a volume or a folder with one DICOM series; an image of nibabel or SimpleITK;
                or an array: HU (slices, rows, columns) from the feet to the head or (rows, columns), rows to posterior and
                columns to the patient's left; or an 8-bit picture (rows, columns) without spacing.
            spacing: mm between the neighbours along each axis of an array.
            window: of an array that was scaled to [0, 1] or to 8 bits: the HU that its lowest and highest value stand for.

        Raises:
            UserError: in one line, if `source` is no scan or several, or cannot be read.
        """
        with self._lock, _undisturbed():  # one evaluator: threads that share a model wait for each other
            scan = as_scan(source, spacing, window)
            try:
                return self.run(scan)
            finally:
                scan.close()

    def run(self, scan: Scan) -> Result:
        """Run the evaluator over the slices of a scan; a thread beside it collects and draws the answers."""
        scan.check_values()
        result = Result(scan, self.tasks, self.name, self.stamp(scan), self.keep_identifiers)
        loader = self.evaluator.data_loader
        loader.dataset.data = slices_of([scan])
        self.evaluator.state.epoch_length = len(loader)

        def collect(samples: Sequence[dict], answers: dict) -> None:
            for row, sample in enumerate(samples):  # MONAI's decollation mixes up detections, which are a list
                answer = {name: to_cpu(values[row]) for name, values in answers.items()}
                result.add(sample, self.postprocessing({**sample, **answer}))

        with helper() as pool:
            collecting = pool.submit(int)

            def hand_over(engine) -> None:
                nonlocal collecting
                collecting.result()  # so that few batches are in memory
                collecting = pool.submit(collect, engine.state.batch[SAMPLES], engine.state.output[CommonKeys.PRED])

            with self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, hand_over):
                self.evaluator.run()
            collecting.result()
        scan.check_unchanged()
        return result.finish(self.novelty)

    def stamp(self, scan: Scan) -> str:
        """What the results of a scan depend on: its files, the weights and the knobs."""
        return text_hash(f"{scan.stamp} {self.fingerprint}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave torch's random numbers as they are, and raise a `UserError` that MONAI has wrapped as it was."""
    try:
        with torch.random.fork_rng(devices=()):
            yield
    except Exception as error:
        if isinstance(error, UserError) or (message := user_message(error)) is None:
            raise
        raise UserError(message) from error


def predict_scans(worklist: Worklist, model: Model) -> None:
    """Predict all scans of a worklist and write their results and the tables; a UserError if none could be predicted."""
    with worklist.locked():
        pending = worklist.pending(model.stamp)
        with ThreadPoolExecutor(1) as pool:  # a result is written while the next scan is predicted
            writing = pool.submit(int)
            for scan in pending:
                with worklist.attempt(scan):
                    result = model.run(scan)
                    writing.result()
                    writing = pool.submit(worklist.publish, scan, result)
            writing.result()
        worklist.finish(model.tasks)
