"""One loss for partially labelled batches: every task is judged on the samples annotated for it."""

from __future__ import annotations

from collections.abc import Mapping

import ignite.distributed as idist
import torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
from torch import nn
from torch.nn import functional as F

from bundle.errors import UserError
from bundle.names import ANNOTATED, CLASS, DETECTION, MASK, SEGMENTATION, TARGET, check_tasks


class _WithFocal(nn.Module):
    """A Dice loss and the focal loss of the same softmax; MONAI's DiceFocalLoss gives its focal part a sigmoid."""

    def __init__(self, dice: type[nn.Module]) -> None:
        super().__init__()
        self.dice, self.focal = dice(softmax=True), FocalLoss(use_softmax=True)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dice(logits, target) + self.focal(logits, target)


class _Tversky(nn.Module):
    """Tversky loss (Salehi et al., arXiv 1706.05721): a missed lesion pixel weighs 0.7, a false one 0.3.

    A pixel missed in the lesion is a false one of the complement, whose weights are therefore exchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.complement, self.lesion = TverskyLoss(alpha=0.7, beta=0.3), TverskyLoss(alpha=0.3, beta=0.7)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        probability = logits.softmax(1)
        return (self.complement(probability[:, :1], target[:, :1]) + self.lesion(probability[:, 1:], target[:, 1:])) / 2


# Losses of logits and target (B, 2, H, W), complement and lesion.
SEGMENTATION_LOSSES = {
    "generalized_dice": lambda: GeneralizedDiceLoss(softmax=True),
    "generalized_dice_focal": lambda: _WithFocal(GeneralizedDiceLoss),
    "dice": lambda: DiceLoss(softmax=True),
    "dice_ce": lambda: DiceCELoss(softmax=True),
    "dice_focal": lambda: _WithFocal(DiceLoss),
    "tversky": _Tversky,
}


class LesionAndComplementLoss(nn.Module):
    """A Dice-like loss of MONAI on the lesion and its complement, as two channels of a softmax.

    On one sigmoid channel and an empty mask the Generalized Dice loss and its gradient are exactly zero, so slices without
    lesion would never punish false positives. The softmax of (-z/2, z/2) is (1 - sigmoid(z), sigmoid(z)): the same
    probability, with the complement present in every slice.

    Args:
        name: a key of `SEGMENTATION_LOSSES`.

    Raises:
        UserError: if the name is unknown.
    """

    def __init__(self, name: str = "generalized_dice") -> None:
        super().__init__()
        if name not in SEGMENTATION_LOSSES:
            raise UserError(f"segmentation_loss: found {name!r}, expected one of {', '.join(SEGMENTATION_LOSSES)}")
        self.loss = SEGMENTATION_LOSSES[name]()

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: logits (B, C, H, W) and mask in {0, 1} of the same shape; every channel is a lesion class of its own."""
        logits, mask = logits.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None]
        return self.loss(torch.cat([-logits / 2, logits / 2], 1), torch.cat([1 - mask, mask], 1))


class MultiTaskLoss(nn.Module):
    """L = sum over tasks of w_t L_t (arXiv 2308.01137), each over the samples annotated for the task.

    Classification: cross-entropy; of a sample that has one of several classes, -log of the sum of their probabilities.
    Segmentation: see `LesionAndComplementLoss`. Reconstruction: mean squared error to the clean slice. Detection: the sum of
    the five Mask R-CNN losses, which the network computes itself. A task without an annotated sample in the batch has no
    term; a batch without any term gives zero.

    Args:
        tasks: task -> weight.
        segmentation_loss: a key of `SEGMENTATION_LOSSES`.
        label_smoothing: of the cross-entropy, 0 to 1.
        uncertainty: learn the balance: w_t exp(-s_t) L_t + s_t / 2 with one trainable s_t = log(sigma_t^2) for each task
            (Kendall et al., CVPR 2018, arXiv 1705.07115; the factor 1/2 of the regression terms is left to w_t).

    Of several processes every term is the mean over the samples of all, as it would be in one process with all of them (but for
    the detection's, which Mask R-CNN averages over the regions drawn in each process).

    After a call `terms` holds the unweighted value of every term, by task, as floats, and the parts of the detection's in
    this process as detection_classifier, detection_box_reg, detection_mask, detection_objectness and detection_rpn_box_reg.
    """

    def __init__(
        self,
        tasks: Mapping[str, float],
        segmentation_loss: str = "generalized_dice",
        label_smoothing: float = 0.0,
        uncertainty: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(tasks, Mapping):
            raise UserError(f"tasks: found {tasks!r}, expected the weight of each, such as {{'{SEGMENTATION}': 1.0}}")
        self.weights = {task: float(tasks[task]) for task in check_tasks(tasks)}
        self.segmentation = LesionAndComplementLoss(segmentation_loss)
        self.label_smoothing = label_smoothing
        self.log_variance = nn.ParameterDict({t: nn.Parameter(torch.zeros(())) for t in self.weights if uncertainty})
        self.terms: dict[str, float] = {}

    def forward(self, pred: dict, label: dict) -> torch.Tensor:
        """Args: pred, the network's output in training mode; label, a batch of `bundle.data.batch.collate`."""
        terms = {}
        for task in self.weights:
            rows = label[ANNOTATED][task]
            if rows.any():
                terms[task] = getattr(self, f"_{task}")(pred[task], label, rows)
        parts = pred[DETECTION] if DETECTION in terms else {}
        if idist.get_world_size() > 1:
            terms = self._over_processes(terms, label)
        self.terms = {task: term.item() for task, term in terms.items()}
        self.terms |= {f"{DETECTION}_{name.removeprefix('loss_')}": part.item() for name, part in parts.items()}
        # Backward works without a term too, and where all terms are those of other processes.
        nothing = torch.zeros((), device=label[CLASS].device, requires_grad=True)
        return sum((self._weighted(task, term) for task, term in terms.items()), nothing)

    def _over_processes(self, terms: Mapping[str, torch.Tensor], label: dict) -> dict[str, torch.Tensor]:
        """Terms whose value is the mean over the samples of all processes, and whose gradient is the share of this one.

        DistributedDataParallel takes the mean of the gradients of the processes, so that a share counts their number times.
        """
        counts = torch.stack([label[ANNOTATED][task].sum() for task in self.weights]).to(torch.float32)
        sums = torch.stack([terms[task].detach() if task in terms else counts.new_zeros(()) for task in self.weights]) * counts
        (all_counts, all_sums), shared = idist.all_reduce(torch.stack([counts, sums])), {}
        for task, count, all_count, total in zip(self.weights, counts, all_counts, all_sums):
            if all_count:
                shared[task] = total / all_count
                if task in terms:
                    share = terms[task] * count * idist.get_world_size() / all_count
                    shared[task] = shared[task] + (share - share.detach())
        return shared

    def _weighted(self, task: str, term: torch.Tensor) -> torch.Tensor:
        if task not in self.log_variance:
            return self.weights[task] * term
        log_variance = self.log_variance[task]
        return self.weights[task] * torch.exp(-log_variance) * term + log_variance / 2

    def _classification(self, logits, label, rows):
        """Cross-entropy: -log of the summed probabilities of the classes that a sample may have."""
        log_probability, candidates = logits[rows].log_softmax(1), label[CLASS][rows]
        candidates = F.pad(candidates, (0, logits.shape[1] - candidates.shape[1]))
        likelihood = log_probability.masked_fill(~candidates, -torch.inf).logsumexp(1)
        return -((1 - self.label_smoothing) * likelihood + self.label_smoothing * log_probability.mean(1)).mean()

    def _segmentation(self, logits, label, rows):
        return self.segmentation(logits[rows], label[MASK][rows])

    def _reconstruction(self, image, label, rows):
        return F.mse_loss(image, label[TARGET])

    def _detection(self, losses, label, rows):
        return sum(losses.values())
