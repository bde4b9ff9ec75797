import os
from pathlib import Path

import command  # noqa: F401 - whose fork server has imported everything
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.transforms import Randomizable
from some_tasks import some_network, some_tasks
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, SequentialSampler

from bundle.errors import UserError
from bundle.training import distributed
from bundle.data.batch import collate
from bundle.training.loss import MultiTaskLoss
from bundle.networks import MultiTaskNet
from bundle.names import ANNOTATED, TASKS

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = 64
# Without batch normalisation, whose statistics are those of the images of one process.
NETWORK = {"tasks": TASKS, "backbone": "test_efficientnet_ln", "image_size": SIZE, "decoder_channels": (8,), "dropout": 0.0}
NETWORK |= {"detection": {"fpn_channels": 8, "box_features": 8, "mask_channels": [8]}}


def sample(index: int, **annotation) -> dict:
    image = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
    return {"image": image, "record": {"image": str(index), "group": "", "source": ""}, **annotation}


def samples() -> list[dict]:
    """Four slices: one process gets the only mask and two classes, the other one class."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 10:30, 20:40] = 1
    return [sample(0, **{"class": 1}), sample(1), sample(2, **{"class": 0, "mask": mask}), sample(3, **{"class": 2})]


def network_without_batch_statistics() -> MultiTaskNet:
    torch.manual_seed(0)
    network = some_network(**NETWORK).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return network


def learn(batch: list[dict], network, loss_function) -> dict:
    """Terms, value and gradients of one backward pass."""
    label = collate(batch, some_tasks())
    core = getattr(network, "module", network)
    for module in core.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    loss = loss_function(network(label["image"], label, label[ANNOTATED]), label)
    loss.backward()
    parameters = [*core.named_parameters(), *loss_function.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    return {"loss": loss.item(), "terms": loss_function.terms, "gradients": gradients}


def learn_in_one_of_two(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = DistributedDataParallel(network_without_batch_statistics(), find_unused_parameters=True)
    torch.save(
        learn(distributed.shard(samples()), network, MultiTaskLoss(some_tasks(), uncertainty=True)),
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one_with_all_samples(tmp_path):
    multiprocessing.start_processes(learn_in_one_of_two, (str(tmp_path),), nprocs=2, start_method="forkserver")
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = learn(samples(), network_without_batch_statistics(), MultiTaskLoss(some_tasks(), uncertainty=True))
    assert whole["terms"].keys() == {"classification", "segmentation", "reconstruction"}
    for part in parts:
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert part["terms"] == pytest.approx(whole["terms"], rel=1e-6)
        assert any(name.startswith("heads.segmentation") for name in part["gradients"])
        assert {name for name in whole["gradients"] if name.startswith("log_variance")} <= part["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(part["gradients"][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_a_sampler_is_dealt_out_in_turn(monkeypatch):
    sampler = SequentialSampler(range(7))
    assert list(distributed.ShardedSampler(sampler)) == list(range(7)) and distributed.shard("abc") == ["a", "b", "c"]
    monkeypatch.setattr(distributed.idist, "get_world_size", lambda: 2)
    for rank, expected in enumerate([[0, 2, 4], [1, 3, 5]]):
        monkeypatch.setattr(distributed.idist, "get_rank", lambda rank=rank: rank)
        sharded = distributed.ShardedSampler(sampler)
        assert list(sharded) == list(sharded) == expected and len(sharded) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.shard("abcde") == ["b", "d"]


class Drawn(Dataset, Randomizable):
    """A random number for each sample, as a random transform draws it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return self.R.randint(1 << 30)


def test_workers_of_two_processes_draw_different_random_numbers(monkeypatch):
    def drawn(rank: int) -> list[int]:
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(0)
        loader = DataLoader(Drawn(), num_workers=2, collate_fn=lambda item: item[0], worker_init_fn=distributed.seed_worker)
        return list(map(int, loader))

    first, second = drawn(0), drawn(1)
    assert len({*first, *second}) == 16
    assert drawn(1) == second


def test_the_overlay_of_several_processes_seeds_the_workers_by_process():
    parser = ConfigParser()
    parser.read_config([CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json"])
    parser.get_parsed_content("imports")
    assert parser.get_parsed_content("train#dataloader#worker_init_fn") is distributed.seed_worker


def test_processes_that_cannot_work_together_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="multi_gpu: found a process that torchrun has not started, expected torchrun"):
        distributed.join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun: found 2 processes that do not know of one another, expected configs/multi"):
        distributed.shard("abcde")
    monkeypatch.setattr(distributed.idist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="torchrun: found 1 records for 2 processes, expected at least one for each"):
        distributed.shard("a")


def test_the_device_is_that_of_the_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.local_device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device() == torch.device("cpu")
