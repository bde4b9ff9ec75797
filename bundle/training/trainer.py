"""The trainer, and the recorder that makes its run repeatable, resumable and readable."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer
from monai.utils import set_determinism
from monai.utils.enums import CommonKeys

from bundle.errors import UserError
from bundle.files import list_file, log_artifacts, write_checkpoint, write_json
from bundle.names import IMAGE, RECORD, SOURCE
from bundle.networks import load_weights, read_weights
from bundle.networks.weights import describe, redescribe
from bundle.tasks import Task, add_heads
from bundle.training.history import plot_curves
from bundle.training.run_folder import close_run

logger = logging.getLogger(__name__)


def check_annotated(records: Sequence[Mapping], tasks: Iterable[Task], init_checkpoint=None) -> None:
    """Check that every task has an annotated record, or a head in `init_checkpoint`, so that no head stays untrained."""
    weights = read_weights(init_checkpoint) if init_checkpoint else ()
    known = {key.split(".")[1] for key in weights if key.startswith("heads.")}
    known |= {task.name for task in tasks if any(map(task.is_annotated, records))}
    if missing := [task.name for task in tasks if task.name not in known]:
        what_to_do = "leave it out of them, or set init_checkpoint to weights that have its head"
        found = f"found no record annotated for {', '.join(missing)}, expected one for each of tasks"
        raise UserError(f"split training: {found}; {what_to_do}")


class MultiTaskTrainer(SupervisedTrainer):
    """MONAI's SupervisedTrainer that keeps every loss term under "loss_terms" of its output, and stops if one is not finite."""

    def _iteration(self, engine, batchdata):
        output = super()._iteration(engine, batchdata)
        terms = {"loss": output[CommonKeys.LOSS].item(), **engine.loss_function.terms}
        if not np.isfinite(terms["loss"]):
            images = ", ".join(record[IMAGE] for record in batchdata[RECORD])
            where = f"iteration {engine.state.iteration} ({images})"
            raise UserError(f"loss: found {terms} in {where}, expected finite values; lower learning_rate")
        output["loss_terms"] = terms
        return [output]  # a list, in whose first item MONAI's handlers look for the loss


def loss_terms(output: list[dict]) -> dict[str, float]:
    """Output transform of MONAI's StatsHandler and TensorBoardStatsHandler: the loss and each of its terms."""
    return output[0]["loss_terms"]


class RunRecorder:
    """Make a training run repeatable, resumable and readable; attach this handler last.

    Every epoch is seeded from (seed, epoch) alone. After every epoch the folder holds `best.pt` (the network of the epoch with
    the highest validation score), `last.pt` (the state_dicts of `state` and the history; a run that finds it goes on from it),
    `history.json` and `curves.png`. At the end `model.pt` holds the best network, with the heads of `init_checkpoint` that this
    run did not have, and `metrics.json` the best epoch. Of several processes the first one writes.

    Args:
        state: name -> object with a state_dict, "network" among them.
        dataset: training dataset, whose random transforms are seeded.
        evaluator: engine of the validation, which puts "score" into its `state.metrics`.
        val_interval: epochs between validations; the last epoch is always validated.
        ema: ignite's EMAHandler or None. With it `best.pt` and `model.pt` hold the average, and `last.pt` both.
    """

    def __init__(
        self, output_dir, state: dict, dataset, evaluator, val_interval=1, seed=0, init_checkpoint=None, resume=True, ema=None
    ) -> None:
        self.folder, self.state, self.dataset, self.evaluator = Path(output_dir), dict(state), dataset, evaluator
        self.val_interval, self.seed, self.ema = val_interval, seed, ema
        self.init_checkpoint, self.resume = init_checkpoint, resume
        self.history: list[dict] = []

    def attach(self, trainer) -> None:
        if self.ema is not None:
            self.ema.attach(trainer)
        trainer.add_event_handler(Events.STARTED, self.start)
        trainer.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.add_terms)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save_epoch)
        trainer.add_event_handler(Events.COMPLETED, self.finish)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, trainer) -> None:
        if trainer.scaler is not None and trainer.scaler.is_enabled():
            self.state["scaler"] = trainer.scaler
        if self.evaluator.network is not self.state["network"]:
            self.state["average"] = self.evaluator.network
        if idist.get_rank() == 0:
            for path in self.folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"):  # TensorBoard's, of this run
                list_file(path)
        if self.history:  # federated learning trains on, epoch by epoch, with weights that it sets itself
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.folder / "last.pt"
        if self.resume and last.exists():
            saved = torch.load(last, map_location=trainer.state.device, weights_only=True)
            for name in self.state.keys() & saved.keys():
                self.state[name].load_state_dict(saved[name])
            self.history = saved["history"]
            trainer.state.epoch = len(self.history)
            trainer.state.iteration = len(self.history) * trainer.state.epoch_length
            logger.info(f"{self.folder}: resumed after epoch {len(self.history)}")
        elif self.init_checkpoint:
            for network in {self.state["network"], self.evaluator.network}:
                loaded = load_weights(network, self.init_checkpoint)
            logger.info(f"{self.folder}: started from {self.init_checkpoint} ({', '.join(loaded)})")

    def fail(self, trainer, error: BaseException) -> None:
        close_run(self.folder)
        raise error

    def start_epoch(self, trainer) -> None:
        seed = int(np.random.SeedSequence([self.seed, trainer.state.epoch]).generate_state(1)[0])
        set_determinism(seed)
        set_rnd(self.dataset, seed=seed + idist.get_rank())
        self.learning_rate = trainer.optimizer.param_groups[0]["lr"]
        self.terms = defaultdict(list)

    def add_terms(self, trainer) -> None:
        for name, value in loss_terms(trainer.state.output).items():
            self.terms[name].append(value)

    def save_epoch(self, trainer) -> None:
        epoch, epochs = trainer.state.epoch, trainer.state.max_epochs
        entry = {"epoch": epoch, "learning_rate": self.learning_rate}
        entry |= {name if name == "loss" else f"loss_{name}": float(np.mean(v)) for name, v in self.terms.items()}
        if epoch % self.val_interval == 0 or epoch == epochs:
            if idist.get_world_size() > 1:  # all evaluate the network of the first, which is kept
                for buffer in self.evaluator.network.buffers():
                    buffer.copy_(idist.broadcast(buffer))
            self.evaluator.run(epoch)
            entry |= {name: float(v) for name, v in self.evaluator.state.metrics.items() if np.isscalar(v)}
        self.history.append(entry)
        trainer.state.metrics = {name: value for name, value in entry.items() if name != "epoch"}  # for those who log them
        if idist.get_rank() == 0:
            if self.best() is entry:
                write_checkpoint(self.evaluator.network.state_dict(), self.folder / "best.pt")
            states = {name: item.state_dict() for name, item in self.state.items()}
            write_checkpoint({**states, "history": self.history}, self.folder / "last.pt")  # killed before, it is repeated
            write_json(self.history, self.folder / "history.json")
            plot_curves(self.history, self.folder / "curves.png")
            figures = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name.startswith(("loss", "score")))
            logger.info(f"{self.folder}: epoch {epoch} of {epochs}: {figures}")

    def best(self) -> dict | None:
        """Entry of the epoch with the highest validation score, the earliest of equals; None before a validation."""
        scored = [entry for entry in self.history if np.isfinite(entry.get("score", np.nan))]
        return max(scored, key=lambda entry: entry["score"]) if scored else None

    def finish(self, trainer) -> None:
        if self.best() is None:
            expected = "expected one to choose the weights by; is the validation split annotated for the tasks?"
            raise UserError(f"{self.folder}: found no epoch with a validation score, {expected}")
        if idist.get_rank() == 0:
            weights = torch.load(self.folder / "best.pt", map_location="cpu", weights_only=True)
            seen = {record[SOURCE] for record in self.dataset.data if SOURCE in record}
            weights = redescribe(weights, sources=sorted(seen.union(describe(weights)["sources"])))
            if self.init_checkpoint:
                weights = add_heads(weights, self.init_checkpoint)
            write_json(self.best(), self.folder / "metrics.json")
            write_checkpoint(weights, self.folder / "model.pt")
            log_artifacts(trainer, [self.folder / "config.json", self.folder / "curves.png"])
            close_run(self.folder)
        idist.barrier()  # what comes next, in any process, finds them written
