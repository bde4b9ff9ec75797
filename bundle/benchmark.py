"""What the shared encoder saves, and what the engine and the data pipeline cost: ratios, each measured within one run.

The absolute times of a machine vary from minute to minute; what is compared is therefore run in turns, and the ratio
is the median over the turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import cycle, islice
from statistics import median

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer

from bundle.engines import MultiTaskTrainer, environment, prepare_batch
from bundle.tasks import TASKS

WARM_UP = 2  # turns that are not counted


def open_config(files: Sequence[str], **entries) -> ConfigParser:
    """Parser of an initialised training configuration.

    Args:
        files: train.json and its overlays.
        entries: ids to set on top, where they are not None.
    """
    workflow = ConfigWorkflow(list(files), **{key: value for key, value in entries.items() if value is not None})
    workflow.parser["validate"]["dataset"]["cache_rate"] = 0.0  # nothing is validated here
    workflow.initialize()
    return workflow.parser


def sharing(parser: ConfigParser, turns: int) -> dict:
    """Inference on one image with a network for each task against one network for all tasks, with equal weights.

    Returns:
        seconds and parameters, both by network ("all tasks" and each task), and ratio: of the sum over the networks of
        one task to the network of all tasks, as "seconds" and "parameters".
    """
    definition = parser.get_parsed_content("network_def", instantiate=False)
    parser.ref_resolver.remove_resolved_content("network_def")  # it is to be instantiated for whoever asks next
    device, size = parser.get_parsed_content("device"), parser.get_parsed_content("image_size")
    networks = {"all tasks": definition.instantiate(tasks=TASKS).to(device).eval()}
    weights = networks["all tasks"].state_dict()
    for task in TASKS:
        networks[task] = definition.instantiate(tasks=[task]).to(device).eval()
        networks[task].load_state_dict({key: weights[key] for key in networks[task].state_dict()})
    image = torch.rand(1, 1, size, size, device=device)
    timers = {
        name: Timer("network(image)", globals={"network": network, "image": image}, num_threads=torch.get_num_threads())
        for name, network in networks.items()
    }
    with torch.inference_mode():
        taken = {name: [] for name in networks}
        for _ in range(turns):  # each timeit warms up with two passes
            for name in networks:
                taken[name].append(timers[name].timeit(1).mean)
    single = [sum(taken[task][turn] for task in TASKS) for turn in range(turns)]
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return {
        "seconds": {name: median(values) for name, values in taken.items()},
        "parameters": parameters,
        "ratio": {
            "seconds": median(apart / shared for apart, shared in zip(single, taken["all tasks"])),
            "parameters": sum(parameters[task] for task in TASKS) / parameters["all tasks"],
        },
    }


def training_step(parser: ConfigParser, turns: int) -> dict:
    """A step of the configured trainer, with all its handlers, against the step of a plain PyTorch loop.

    Both see the same batches, from memory, with the same weights and random numbers, in turns.

    Returns:
        seconds of a step, "trainer" and "plain", ratio of the two, and the largest loss_difference over the steps (the
        two loops do the same work: 0 where torch is deterministic).
    """
    trainer: MultiTaskTrainer = parser.get_parsed_content("train::trainer")
    device = trainer.state.device
    batches = list(islice(cycle(trainer.data_loader), WARM_UP + turns))
    trainer.data_loader, trainer.state.epoch_length = batches, len(batches)
    # Copied together, so that the optimizer's parameters are those of the copied network.
    network, loss_function, optimizer = deepcopy((trainer.network, trainer.loss_function, trainer.optimizer))
    taken, differences, begin = {"trainer": [], "plain": []}, [], timer()

    def plain_step(batch) -> float:
        network.train()
        optimizer.zero_grad()
        image, label, _, arguments = prepare_batch(batch, device)
        loss = loss_function(network(image, **arguments), label)
        loss.backward()
        optimizer.step()
        return loss.item()

    @trainer.on(Events.ITERATION_STARTED)
    def seed(engine) -> None:
        torch.manual_seed(engine.state.iteration)

    @trainer.on(Events.ITERATION_COMPLETED)  # runs after the handlers of the configuration
    def take_turns(engine) -> None:
        nonlocal begin
        taken["trainer"].append(timer() - begin)
        begin = timer()
        seed(engine)
        loss = plain_step(engine.state.batch)
        taken["plain"].append(timer() - begin)
        differences.append(abs(loss - engine.state.output["loss_terms"]["loss"]))
        if engine.state.iteration == len(batches):
            engine.terminate(skip_completed=True)  # before validation and checkpoints, which the plain loop lacks
        begin = timer()

    trainer.run()
    pairs = list(zip(taken["trainer"], taken["plain"]))[WARM_UP:]
    return {
        "seconds": {name: median(values[WARM_UP:]) for name, values in taken.items()},
        "ratio": median(ours / plain for ours, plain in pairs),
        "loss_difference": max(differences),
    }


def data_pipeline(parser: ConfigParser, turns: int) -> float:
    """Samples per second of the training data loader alone: cached, augmented and collated."""
    loader = parser.get_parsed_content("train::dataloader")
    epoch = Timer("for _ in loader: pass", globals={"loader": loader}, num_threads=torch.get_num_threads())
    return len(loader) * loader.batch_size / epoch.timeit(turns).mean  # timeit warms up with two epochs


def report(parser: ConfigParser, turns: int) -> str:
    """All three measurements as text: machine and configuration, then a line for each ratio with its parts and goal."""
    get = parser.get_parsed_content
    shared, step, samples = sharing(parser, turns), training_step(parser, turns), data_pipeline(parser, max(1, turns // 4))
    size, batch_size = get("image_size"), get("batch_size")
    times, parameters = shared["seconds"], shared["parameters"]
    rate = batch_size / step["seconds"]["trainer"]
    versions = environment()
    lines = [
        f"{versions['cpu']}, {versions['threads']} threads, device {get('device')}; Python {versions['python']}, "
        f"PyTorch {versions['torch']}, MONAI {versions['monai']}",
        f"{get('backbone')}, {size} x {size} pixels, {len(get('train::data'))} training records, seed {get('seed')}, "
        f"median of {turns} turns",
        "",
        f"{'network':16}{'s per image':>12}{'parameters':>12}",
        *(f"{name:16}{times[name]:12.4f}{parameters[name]:12,d}" for name in times),
        "",
        f"networks of one task : network of all tasks, seconds     {shared['ratio']['seconds']:7.2f}  (goal: at least 2 "
        "with VGG-13)",
        f"networks of one task : network of all tasks, parameters  {shared['ratio']['parameters']:7.2f}",
        f"training step : step of a plain PyTorch loop             {step['ratio']:7.3f}  (goal: at most 1.05; "
        f"{step['seconds']['trainer']:.3f} : {step['seconds']['plain']:.3f} s, batch of {batch_size}, "
        f"losses differ by {step['loss_difference']:.1g})",
        f"data pipeline : training, samples per second             {samples / rate:7.1f}  (goal: at least 5; "
        f"{samples:.1f} : {rate:.2f})",
    ]
    return "\n".join(lines) + "\n"
