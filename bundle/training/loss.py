"""One loss for partially labelled batches: every task is judged on the samples annotated for it."""

from collections.abc import Iterable, Mapping

import ignite.distributed as idist
import torch
from torch import nn

from bundle.names import ANNOTATED, TARGET
from bundle.tasks import Task


class MultiTaskLoss(nn.Module):
    """L = sum over tasks of w_t L_t (arXiv 2308.01137), each over the samples annotated for the task.

    A task without an annotated sample in the batch has no term; a batch without any term gives zero. With several processes a
    term is the mean over the samples of all, except that Mask R-CNN averages over the regions drawn in each process. After a
    call `terms` holds the unweighted terms by task, and the parts of a loss that has parts as TASK_PART.

    Args:
        uncertainty: learn the balance: w_t exp(-s_t) L_t + s_t / 2 with one trainable s_t = log(sigma_t^2) for each task
            (Kendall et al., CVPR 2018, arXiv 1705.07115; the factor 1/2 of the regression terms is left to w_t).
    """

    def __init__(self, tasks: Iterable[Task], uncertainty: bool = False) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.log_variance = nn.ParameterDict({task.name: nn.Parameter(torch.zeros(())) for task in self.tasks if uncertainty})
        self.terms: dict[str, float] = {}

    def forward(self, pred: dict, label: dict) -> torch.Tensor:
        """Args: pred, the network's output in training mode; label, a batch of `bundle.data.batch.collate`."""
        terms, parts = {}, {}
        for task in self.tasks:
            rows = label[ANNOTATED][task.name]
            if rows.any():
                term = task.loss(pred[task.name], label, rows)
                if isinstance(term, Mapping):
                    parts |= {f"{task.name}_{name}": part.item() for name, part in term.items()}
                    term = sum(term.values())
                terms[task.name] = term
        if idist.get_world_size() > 1:
            terms = self._over_processes(terms, label)
        self.terms = {name: term.item() for name, term in terms.items()} | parts
        # Backward works without a term too, and where all terms are those of other processes.
        loss = torch.zeros((), device=label[TARGET].device, requires_grad=True)
        for task in (task for task in self.tasks if task.name in terms):
            weight, half = task.weight, 0.0
            if task.name in self.log_variance:
                weight, half = weight * torch.exp(-self.log_variance[task.name]), self.log_variance[task.name] / 2
            loss = loss + (weight * terms[task.name] + half)
        return loss

    def _over_processes(self, terms: Mapping[str, torch.Tensor], label: dict) -> dict[str, torch.Tensor]:
        """Terms whose value is the mean over the samples of all processes, and whose gradient is the share of this one."""
        names = [task.name for task in self.tasks]
        counts = torch.stack([label[ANNOTATED][name].sum() for name in names]).to(torch.float32)
        sums = torch.stack([terms[name].detach() if name in terms else counts.new_zeros(()) for name in names]) * counts
        (all_counts, all_sums), shared = idist.all_reduce(torch.stack([counts, sums])), {}
        for name, count, all_count, total in zip(names, counts, all_counts, all_sums):
            if all_count:
                shared[name] = total / all_count
                if name in terms:  # DistributedDataParallel takes the mean of the gradients, which is made a sum again
                    share = terms[name] * count * idist.get_world_size() / all_count
                    shared[name] = shared[name] + (share - share.detach())
        return shared
