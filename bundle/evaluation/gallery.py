"""A picture of the cases that an evaluation did worst on."""

import logging
from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
from ignite.engine import Events
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from monai.utils.enums import CommonKeys

from bundle.errors import UserError
from bundle.files import write_figure
from bundle.names import ANNOTATED, IMAGE, RECORD, TARGET
from bundle.tasks import Task

logger = logging.getLogger(__name__)

STYLES = ("#4cc9f0", "dashed"), ("#ff8c42", "solid")  # of the annotation and of the answer


class FailureGallery:
    """Handler of MONAI's SupervisedEvaluator that draws the worst cases of every task (`Task.judge`), worst first, as one PNG.

    A task has a row of `columns` cases, and none without annotated cases. `with_images` False draws outlines alone, of the
    tasks that have some, for data whose images may not be shown.
    """

    def __init__(self, tasks: Sequence[Task], path, columns: int = 6, with_images: bool = True) -> None:
        self.tasks = [task for task in tasks if with_images or task.outlined]
        if not self.tasks:
            found = ", ".join(task.name for task in tasks)
            raise UserError(f"with_images: found false for {found}, expected true; none of them has outlines")
        self.path, self.columns, self.with_images = Path(path), columns, with_images
        self.worst: dict[str, list[dict]] = {}

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.draw)

    def reset(self, engine) -> None:
        self.worst = {task.name: [] for task in self.tasks}
        self.seen = 0  # cases so far

    def update(self, engine) -> None:
        label, pred = engine.state.output[CommonKeys.LABEL], engine.state.output[CommonKeys.PRED]
        for task in (task for task in self.tasks if task.name in pred):
            cases = task.cases(pred[task.name], label, thorough=False)
            for index in filter(cases.__getitem__, label[ANNOTATED][task.name].nonzero().flatten().tolist()):
                goodness, text = task.judge(cases[index])
                text = f"{Path(label[RECORD][index][IMAGE]).name}\n{text}"
                # In the whole data set: rank r of n evaluates the records r, r + n, … (`bundle.training.distributed.shard`).
                place = (self.seen + index) * idist.get_world_size() + idist.get_rank()
                item = {"goodness": goodness, "place": place, "text": text, "image": label[TARGET][index, 0].cpu().numpy()}
                self.worst[task.name].append(item | task.outlines(pred[task.name], label, index))
            self._keep_worst(task.name)
        self.seen += len(label[RECORD])

    def draw(self, engine) -> None:
        if idist.get_world_size() > 1:
            parts = idist.all_gather(self.worst)
            self.worst = {task: [item for part in parts for item in part[task]] for task in self.worst}
        if idist.get_rank() > 0:
            return
        for task in self.worst:
            self._keep_worst(task)
        rows = {task: items for task, items in self.worst.items() if items}
        if not rows:
            raise UserError(f"gallery: found no case annotated for {', '.join(self.worst)}, expected some")
        self._draw(rows)
        logger.info(f"{self.path}: the worst cases of {', '.join(rows)}")

    def _keep_worst(self, task: str) -> None:
        self.worst[task] = sorted(self.worst[task], key=lambda item: (item["goodness"], item["place"]))[: self.columns]

    def _draw(self, rows: dict[str, list[dict]]) -> None:
        figure = Figure(figsize=(2.2 * self.columns, 2.6 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), self.columns, squeeze=False)
        for row, items in zip(axes, rows.values()):
            for axis in row[len(items) :]:
                axis.set_axis_off()
            for axis, item in zip(row, items):
                self._draw_item(axis, item)
        figure.suptitle("the worst cases: annotation dashed blue, answer orange", fontsize=9)
        write_figure(figure, self.path)

    def _draw_item(self, axis, item: dict) -> None:
        image = item["image"] if self.with_images else np.zeros_like(item["image"])
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        if "error" in item:
            axis.imshow(item["error"], cmap="magma", vmin=0, vmax=0.5, alpha=(4 * item["error"]).clip(0, 1))
        for masks, (color, line) in zip(item.get("masks", ()), STYLES):
            for mask in filter(np.any, masks):
                axis.contour(mask, [0.5], linewidths=1, colors=color, linestyles=line)
        for boxes, (color, line) in zip(item.get("boxes", ()), STYLES):
            for x1, y1, x2, y2 in boxes - 0.5:  # imshow has the centre of the first pixel at 0, boxes have its edge there
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linestyle=line))
        axis.set_title(item["text"], fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
