"""Detection: boxes and masks of the lesions in a slice."""

from collections.abc import Mapping, Sequence
from inspect import signature

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou
from torch.nn.functional import one_hot
from torchvision import ops

from bundle.data.batch import plain
from bundle.data.transforms import move_boxes
from bundle.errors import UserError
from bundle.names import BOXES, DETECTION, IMAGE, INSTANCES, SLICE, SOURCE
from bundle.networks.detection import MaskRCNNHead
from bundle.tasks.base import Figures, Task
from bundle.tasks.lesions import link_boxes

# COCO's AP, at IoU 0.1 and 0.5 and averaged over 0.5:0.05:0.95; its lowest threshold, 0.1, comes first.
COCO = COCOMetric(classes=["lesion"], iou_list=(0.1, 0.5), iou_range=(0.5, 0.95, 0.05), max_detection=(100,), verbose=False)
FOUND_SCORE = 0.5  # of detections that are counted as such in per_case.csv and in pictures
SAME_LESION = 0.3  # IoU above which detections of several views or networks are one lesion
FALSE_POSITIVE_RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
RECALLS = np.linspace(0, 1, 101)
HEAD = {name: argument.default for name, argument in list(signature(MaskRCNNHead).parameters.items())[2:]}


class Detection(Task):
    """Boxes, scores and masks of lesions, by a Mask R-CNN head that computes its five losses itself.

    A case holds the detections matched once to the annotated boxes, and masks to masks where there are instances. `detection`
    are arguments of `MaskRCNNHead`; `score_threshold` is the lowest score in a prediction; `link_iou`: see `link_boxes`.
    """

    name, field = DETECTION, BOXES
    outlined = True
    described = {"detection": HEAD}
    free = ("detection::score_threshold", "detection::nms_threshold", "detection::detections_per_image")
    headline = ("ap10", "ap50")  # AP@0.5 alone is noisy while a detector still learns
    columns = {"AP@0.1": "ap10", "AP@0.5": "ap50"}

    def __init__(self, detection: Mapping, score_threshold: float = 0.5, link_iou: float = 0.2, **_) -> None:
        if unknown := [name for name in detection if name not in HEAD]:
            raise UserError(f"detection: found {', '.join(unknown)}, expected some of {', '.join(HEAD)}")
        if not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold: found {score_threshold}, expected a number from 0 to 1")
        self.options, self.score_threshold, self.link_iou = detection, score_threshold, link_iou

    def strata(self, records: Sequence[Mapping]) -> list[tuple]:
        return [(bool(record[BOXES]), record.get(SOURCE)) for record in records]

    def collate(self, samples: Sequence[Mapping], image: torch.Tensor) -> dict:
        """detection: for each sample None or what `MaskRCNNHead` takes as its target."""
        targets = [{"boxes": plain(sample[BOXES])} if BOXES in sample else None for sample in samples]
        for target, sample in zip(targets, samples):
            if target:
                target["labels"] = torch.ones(len(target["boxes"]), dtype=torch.int64)
                target |= {"masks": plain(sample[INSTANCES])} if INSTANCES in sample else {}
        return {DETECTION: targets}

    def head(self, channels: Sequence[int], strides: Sequence[int], in_channels: int) -> MaskRCNNHead:
        return MaskRCNNHead(channels, strides, **self.options)

    def loss(self, answer: Mapping[str, torch.Tensor], batch: Mapping, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name.removeprefix("loss_"): value for name, value in answer.items()}

    def cases(self, answer: Sequence[Mapping | None], batch: Mapping, thorough: bool) -> list[dict]:
        """`true_positives` and `false_positives` count the detections with a score of `FOUND_SCORE` or more, at IoU 0.1."""
        return [_case(found, target) if target else {} for found, target in zip(answer, batch[DETECTION])]

    def comparable(self, cases: Sequence[dict], sources: Sequence[str]) -> Sequence[dict]:
        """Where a source has boxes but no instance masks, its images without lesions have no part in mask AP."""
        masked = {source for source, case in zip(sources, cases) if "mask_match" in case and case["n_boxes"]}
        without = [{name: value for name, value in case.items() if name != "mask_match"} for case in cases]
        return [case if source in masked else bare for source, case, bare in zip(sources, cases, without)]

    def figures(self, cases: Sequence[dict]) -> Figures:
        """AP at IoU 0.1, 0.5 and 0.5:0.95, mask AP, and sensitivity at given false positives per image (FROC, IoU 0.1).

        Left out where there is no annotated lesion. MONAI's COCOMetric computes the same AP from the same matches, some fifty
        times slower than the bootstrap can wait for.
        """
        boxes, masks = Matches([case["match"] for case in cases]), Matches([case.get("mask_match", {}) for case in cases])

        def figures(weights: np.ndarray) -> dict[str, float]:
            result = dict(zip(("ap10", "ap50", "ap"), boxes.average_precision(weights)))
            result |= dict(zip(("mask_ap10", "mask_ap50", "mask_ap"), masks.average_precision(weights)))
            if weights @ boxes.lesions:
                rates, sensitivity = boxes.froc(weights)
                reached = [float(sensitivity[rates <= rate].max(initial=0.0)) for rate in FALSE_POSITIVE_RATES]
                result |= {f"froc_{rate:g}": value for rate, value in zip(FALSE_POSITIVE_RATES, reached)}
                result["froc_mean"] = float(np.mean(reached))
            return result

        return figures

    def is_defined(self, case: Mapping, figure: str) -> bool:
        return "mask_match" in case or not figure.startswith("mask_")

    def finish(self, report: dict, cases: Sequence[dict]) -> dict:
        froc = {name: report.pop(name) for name in list(report) if name.startswith("froc_")}
        return report | ({"froc": {name.removeprefix("froc_"): value for name, value in froc.items()}} if froc else {})

    def table_row(self, case: Mapping) -> dict:
        return {name: case[name] for name in ("n_boxes", "n_detections", "true_positives", "false_positives")}

    def draw(self, report: Mapping, cases: Sequence[dict], sources: Sequence[str]) -> Figure | None:
        """The FROC curve."""
        if "froc" not in report:
            return None
        rates, sensitivity = Matches([case["match"] for case in cases]).froc(np.ones(len(cases)))
        figure = Figure(figsize=(5, 4), layout="constrained")
        axis = figure.subplots()
        axis.step([0, *rates], [0, *sensitivity], where="post")
        axis.set(title="FROC, IoU 0.1", xlabel="false positives per image", ylabel="sensitivity", ylim=(0, 1))
        axis.set_xscale("symlog", linthresh=0.125)
        axis.set_xlim(0, 8)
        return figure

    def judge(self, case: Mapping) -> tuple[float, str]:
        missed, invented = case["n_boxes"] - case["true_positives"], case["false_positives"]
        return -(missed + invented), f"{missed} of {case['n_boxes']} missed, {invented} invented"

    def outlines(self, answer: Sequence[Mapping], batch: Mapping, index: int) -> dict:
        found = answer[index]["boxes"][answer[index]["scores"] >= FOUND_SCORE]
        return {"boxes": (batch[DETECTION][index]["boxes"].cpu().numpy(), found.cpu().numpy())}

    def mirror(self, answer: Sequence[Mapping | None], width: int) -> list:
        mirrored = [found and {**found, "masks": found["masks"].flip(-1)} for found in answer]
        for found in filter(None, mirrored):
            x1, y1, x2, y2 = found["boxes"].unbind(1)
            found["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
        return mirrored

    def join_views(self, answers: Sequence) -> list:
        """Weighted boxes fusion: see `fuse`."""
        return [None if found[0] is None else fuse(found) for found in zip(*answers)]

    def join_members(self, answers: Sequence) -> list:
        """All detections, of overlapping ones the surest, by descending score."""
        joined = [found[0] and _pooled(found) for found in zip(*answers)]
        kept = [found and ops.nms(found["boxes"], found["scores"], SAME_LESION) for found in joined]
        return [found and {name: values[rows] for name, values in found.items()} for found, rows in zip(joined, kept)]

    def to_slice(self, answer: Mapping[str, torch.Tensor], sample: Mapping, seen) -> dict[str, torch.Tensor]:
        """Boxes in pixels of the stored slice, x = column as stored, clipped to its edges; weak and vanished ones go.

        {"boxes" (N, 4) x1 y1 x2 y2, "scores" (N,), "areas" (N,) of the instance masks (above 0.5) in those pixels}.
        """
        boxes, scores, masks = (answer[name] for name in ("boxes", "scores", "masks"))
        image, stored = sample[IMAGE], sample[SLICE]
        areas = (masks > 0.5).sum((1, 2, 3)) * torch.linalg.det(image.affine[:2, :2]).abs().float()
        rows, columns = stored.shape[-2:]
        if stored.affine[0, 1]:  # stored with rows and columns exchanged
            rows, columns = columns, rows
        boxes = ops.clip_boxes_to_image(move_boxes(boxes, image.affine), (rows, columns))
        kept = (scores >= self.score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return {"boxes": boxes[kept], "scores": scores[kept], "areas": areas[kept]}

    def row(self, answer: Mapping[str, torch.Tensor], view, result) -> dict:
        found = zip(answer["boxes"].tolist(), answer["scores"].tolist(), answer["areas"].tolist())
        boxes = [([round(v, 2) for v in box], round(score, 6), round(area, 4)) for box, score, area in found]
        return {"boxes": [dict(zip(("box", "score", "area"), box)) for box in boxes]}

    def entry(self, result) -> list[dict]:
        """The boxes of the slices, linked to lesions in space."""
        return link_boxes([row["boxes"] for row in result.slices], result.scan, self.link_iou)

    def caption(self, row: Mapping) -> list[str]:
        return [f"{len(row['boxes'])} box" + ("" if len(row["boxes"]) == 1 else "es")]

    def lesions(self, entry: Sequence[Mapping]) -> list[dict]:
        return list(entry)

    def report(self, entry: Sequence[Mapping]) -> dict[str, str]:
        return {} if entry else {"lesions": "no box reaches the score threshold"}

    def line(self, entry: Sequence[Mapping]) -> str:
        scores = [lesion["score"] for lesion in entry]
        return f"{len(scores)} detected" + (f", highest score {max(scores):.2f}" if scores else "")

    def scan_columns(self, entry: Sequence[Mapping]) -> dict:
        return {"lesions": len(entry), "highest score": max((lesion["score"] for lesion in entry), default=None)}

    def slice_columns(self, row: Mapping) -> dict:
        scores = [box["score"] for box in row["boxes"]]
        return {"boxes": len(scores), "highest score": max(scores, default=None)}


def fuse(detections: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Fuse the detections of several views of an image (weighted boxes fusion: Solovyev et al., arXiv 1910.13302).

    Boxes and masks of overlapping detections are averaged by score; their score is the mean over all views.
    """
    both = _pooled(detections)
    strongest = ops.nms(both["boxes"], both["scores"], SAME_LESION)
    if not len(strongest):
        return dict(detections[0])
    # Every detection belongs to the strongest one that it overlaps most; nms left none without.
    owner = ops.box_iou(both["boxes"][strongest], both["boxes"]).argmax(0)
    shares = one_hot(owner, len(strongest)).T * both["scores"]  # (fused, found)
    split = shares.split([len(found["scores"]) for found in detections], 1)
    scores = sum(part.amax(1) for part in split if part.shape[1]) / len(detections)
    shares = shares / shares.sum(1, keepdim=True)
    order = scores.argsort(descending=True)
    return {
        "boxes": (shares @ both["boxes"])[order],
        "labels": both["labels"][strongest][order],
        "scores": scores[order],
        "masks": torch.einsum("fn,nchw->fchw", shares, both["masks"])[order],
    }


def _pooled(detections: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([found[name] for found in detections]) for name in detections[0]}


def _case(detection: Mapping, target: Mapping) -> dict:
    scores = detection["scores"].cpu().numpy()
    boxes, truth = detection["boxes"].cpu().numpy(), target["boxes"].cpu().numpy()
    case = {"match": _match(box_iou, boxes, scores, truth), "n_boxes": len(truth), "n_detections": len(scores)}
    found = case["match"].get(0)
    hits = found["dtMatches"][0][found["dtScores"] >= FOUND_SCORE] if found else np.array([])
    case |= {"true_positives": int((hits > 0).sum()), "false_positives": int((hits == 0).sum())}
    if "masks" in target:
        masks = (detection["masks"][:, 0] > 0.5).flatten(1).cpu().numpy()
        case["mask_match"] = _match(_mask_iou, masks, scores, target["masks"].flatten(1).bool().cpu().numpy())
    return case


def _match(iou, pred: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> dict:
    found, annotated = ([np.zeros(len(items), dtype=int)] for items in (pred, truth))  # all of one class
    return matching_batch(iou, COCO.get_iou_thresholds(), [pred], found, [scores], [truth], annotated, max_detections=100)[0]


def _mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every mask of (N, pixels) with every mask of (M, pixels)."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    both = a @ b.T
    return both / np.maximum(a.sum(1)[:, None] + b.sum(1)[None] - both, 1)


class Matches:
    """Detections of many images, by descending score, and which of them are hits; {} stands for an image without matches."""

    def __init__(self, matches: Sequence[dict]) -> None:
        found = [(image, match[0]) for image, match in enumerate(matches) if match]
        scores = np.concatenate([np.zeros(0), *(match["dtScores"] for _, match in found)])
        order = np.argsort(-scores, kind="stable")
        self.images = np.concatenate([np.zeros(0, int), *(np.full(len(m["dtScores"]), image) for image, m in found)])[order]
        thresholds = range(len(COCO.get_iou_thresholds()))
        hits = [np.concatenate([np.zeros(0), *(m["dtMatches"][t] for _, m in found)])[order] > 0 for t in thresholds]
        self.loosest = hits[0]
        self.hits = [np.flatnonzero(hit) for hit in hits]
        self.lesions = np.zeros(len(matches))
        self.lesions[[image for image, _ in found]] = [match["gtIgnore"].size for _, match in found]

    def average_precision(self, weights: np.ndarray) -> tuple[float, ...]:
        """COCO's AP (precision at 101 recalls) at the first and second threshold and averaged from the second on.

        Precision is taken at the hits alone: between two of them it only falls.
        """
        lesions, drawn = weights @ self.lesions, weights[self.images]
        if not lesions:
            return ()
        so_far, at = np.cumsum(drawn), []
        for hits in self.hits:
            true = np.cumsum(drawn[hits])
            precision = np.append(true / np.maximum(so_far[hits], 1), 0)  # 0 at recalls that are never reached
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at.append(precision[np.searchsorted(true / lesions, RECALLS)].mean())
        return float(at[0]), float(at[1]), float(np.mean(at[1:]))

    def froc(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """False positives per image and sensitivity at every score threshold, from high to low, at IoU 0.1.

        MONAI's compute_froc_curve_data leaves out the lowest threshold, so that the last detections never count.
        """
        drawn = weights[self.images]
        return np.cumsum(drawn * ~self.loosest) / weights.sum(), np.cumsum(drawn * self.loosest) / (weights @ self.lesions)
