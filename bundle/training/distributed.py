"""Several processes, started by torchrun, that work as one; a process alone needs nothing of it."""

import atexit
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice

import ignite.distributed as idist
import torch
from monai.data.utils import set_rnd
from torch import distributed
from torch.utils.data import Sampler, get_worker_info

from bundle.errors import UserError


def local_device() -> torch.device:
    """The GPU of this process if there is one, by LOCAL_RANK of torchrun; otherwise the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def join() -> None:
    """Join the processes that torchrun started, with nccl on GPUs and gloo on CPUs, until this one ends.

    Only the first process logs more than warnings. Processes wait for one another without limit: torchrun ends all if one dies.
    """
    if distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        expected = "expected torchrun --nproc_per_node=N -m monai.bundle run …; leave the multi_gpu config away for one process"
        raise UserError(f"multi_gpu: found a process that torchrun has not started, {expected}")
    idist.initialize("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=7))
    atexit.register(idist.finalize)
    if idist.get_rank() > 0:
        logging.disable(logging.INFO)


def shard(records: Sequence) -> list:
    """The records that this process evaluates: every n-th for n processes, beginning with its rank."""
    started, processes = int(os.environ.get("WORLD_SIZE", 1)), idist.get_world_size()
    if started != processes:
        expected = "expected configs/multi_gpu_train.json as the last config_file"
        raise UserError(f"torchrun: found {started} processes that do not know of one another, {expected}")
    if len(records) < processes:
        raise UserError(f"torchrun: found {len(records)} records for {processes} processes, expected at least one for each")
    return list(records)[idist.get_rank() :: processes]


def seed_worker(worker: int) -> None:
    """Seed the random transforms in a worker of a data loader; MONAI's seeds are the same in the workers of all processes."""
    info = get_worker_info()
    set_rnd(info.dataset, seed=info.seed + info.num_workers * int(os.environ.get("RANK", 0)))


class ShardedSampler(Sampler):
    """Samples of a sampler, dealt out to the processes in turn; a rest that their number does not divide is left out.

    If the random numbers of all processes are in the same state when an epoch begins, n processes with batches of b see
    together what one process with batches of n b sees.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler) // idist.get_world_size()

    def __iter__(self):
        processes = idist.get_world_size()
        return islice(iter(self.sampler), idist.get_rank(), len(self) * processes, processes)
