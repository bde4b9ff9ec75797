"""Ratios measured in one run: what sharing an encoder saves, what the engine and the parts of a step cost, how fast the data are.

With --scan instead: how fast the backends of prediction are, and how far their answers agree. With --pace: how long
`chestct predict` takes beside the network alone. The absolute times of a machine vary from minute to minute; so what is
compared runs in turns, and a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from math import inf
from operator import truediv
from pathlib import Path
from statistics import median

import nibabel
import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer
from torchvision.ops import box_iou

from bundle.data.volumes import find_scans
from bundle.errors import UserError, exit_in_one_line
from bundle.data.batch import prepare_batch
from bundle.training.run_folder import environment
from bundle.training.loss import MultiTaskLoss
from bundle.training.trainer import MultiTaskTrainer, loss_terms
from bundle.inference.backends import PACKAGES, accelerate, one_by_one, run_onnxruntime
from bundle.inference.slices import collate, slices_of
from bundle.networks import load_weights
from bundle.names import DETECTION, IMAGE, TASKS

CONFIGS = Path(__file__).parents[1] / "configs"
TORCH, ALONE = "torch", "torch, one by one"  # rows of the comparison of backends
WARM_UP = 2  # turns that are not counted
LAYOUTS = ("contiguous_format", "channels_last")  # of torch


def open_config(files: Sequence[str], **entries) -> ConfigParser:
    """Parser of an initialised configuration.

    Args:
        files: train.json or inference.json, and its overlays.
        entries: ids to set on top, where they are not None.
    """
    workflow = ConfigWorkflow(list(files), **{key: value for key, value in entries.items() if value is not None})
    if "validate" in workflow.parser:
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
    device, size = parser.get_parsed_content("device"), parser.get_parsed_content("model")["image_size"]
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
        differences.append(abs(loss - loss_terms(engine.state.output)["loss"]))
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


def step_parts(parser: ConfigParser, turns: int) -> dict[str, dict[str, float]]:
    """Forward and backward pass of one training batch by part, with weights in both memory layouts, in turns.

    Returns:
        By layout: seconds of the encoder, and of the head and loss of each task, without the encoder below it.
    """
    trainer: MultiTaskTrainer = parser.get_parsed_content("train::trainer")
    image, label, _, arguments = prepare_batch(next(iter(trainer.data_loader)), trainer.state.device)
    network, tasks = deepcopy(trainer.network).train(), {task.name: task for task in trainer.loss_function.tasks}
    heads = network.heads
    taken = {layout: {part: [] for part in ("encoder", *tasks)} for layout in LAYOUTS}
    for _ in range(1 + turns):
        for layout, parts in taken.items():
            network.heads = heads
            network.to(memory_format=getattr(torch, layout))
            for part, seconds in parts.items():
                kept = [part] if part in tasks else []
                network.heads = torch.nn.ModuleDict({name: heads[name] for name in kept})
                begin = timer()
                if kept:
                    MultiTaskLoss([tasks[part]])(network(image, **arguments), label).backward()
                else:
                    sum(feature.mean() for feature in network.encoder(image)).backward()
                seconds.append(timer() - begin)
                network.zero_grad()
    medians = {layout: {part: median(values[1:]) for part, values in parts.items()} for layout, parts in taken.items()}
    for parts in medians.values():
        parts.update({name: parts[name] - parts["encoder"] for name in tasks})
    return medians


def data_pipeline(parser: ConfigParser, turns: int) -> float:
    """Samples per second of the training data loader alone: cached, augmented and collated."""
    loader = parser.get_parsed_content("train::dataloader")
    epoch = Timer("for _ in loader: pass", globals={"loader": loader}, num_threads=torch.get_num_threads())
    return len(loader) * loader.batch_size / epoch.timeit(turns).mean  # timeit warms up with two epochs


def backends(parser: ConfigParser, turns: int, exported: Sequence[str] = ()) -> dict:
    """Prediction of the slices of scans by every backend and exported file: in a turn each answers the same batch.

    Torch has a second row, without batches: that is how the other backends work, and on a CPU it can be faster.

    Args:
        parser: of inference.json, with `input`; an empty `checkpoint` stands for random weights (seed 0).
        turns: number of turns; the slices start anew where they end.
        exported: files of `TensorView`, made with the same weights: see `read_exported`.

    Returns:
        By row: first_call, seconds for one image, with the export; seconds of a slice; ratio, the median over the turns of
        the time of torch in its own, and ratio_alone, likewise of torch without batches; difference, the largest from torch
        by answer (boxes in pixels). And detections, their mean number in a slice.

    Raises:
        UserError: if `input` holds no scan.
    """
    get = parser.get_parsed_content
    torch.manual_seed(0)
    network = get("multitask_net").eval()
    if get("checkpoint"):
        load_weights(network, get("checkpoint"), strict=True)
    images = _slices(get("input"), get("output_dir"), get("preprocessing"), get("model")["image_size"])
    rows = {TORCH: network, ALONE: partial(one_by_one, network)}
    rows |= {backend: accelerate(network, backend) for backend in PACKAGES if backend != TORCH}
    rows |= {Path(path).name: read_exported(path, list(network.heads)) for path in exported}
    first_call, taken, differences, found = {}, {row: [] for row in rows}, {row: {} for row in rows}, []
    with torch.no_grad():
        for row, answer in rows.items():
            begin = timer()
            answer(images[:1])
            first_call[row] = timer() - begin
        for batch in islice(cycle(images.split(get("batch_size"))), turns):
            answers = {}
            for row, answer in rows.items():
                begin = timer()
                answers[row] = answer(batch)
                taken[row].append((timer() - begin) / len(batch))
            for row in rows:
                for name, value in _differences(answers[row], answers[TORCH]):
                    differences[row][name] = max(value, differences[row].get(name, 0.0))
            found += [len(detection["boxes"]) for detection in answers[TORCH].get(DETECTION, [])]
    return {
        "first_call": first_call,
        "seconds": {row: median(values) for row, values in taken.items()},
        "ratio": {row: median(map(truediv, taken[TORCH], values)) for row, values in taken.items()},
        "ratio_alone": {row: median(map(truediv, taken[ALONE], values)) for row, values in taken.items()},
        "difference": differences,
        "detections": sum(found) / len(found) if found else 0.0,
    }


def read_exported(path: str, tasks: Sequence[str]) -> Callable[[torch.Tensor], dict]:
    """Open `TensorView` as MONAI's ckpt_export (.ts) or onnx_export (.onnx) wrote it; ONNX answers image by image.

    Args:
        path: of the file; ONNX is run by onnxruntime on the CPU.
        tasks: of the network in its order; the file may lack detection.

    Returns:
        From images (B, C, H, W) to the dictionary of `MultiTaskNet.forward` in evaluation mode, without embedding.

    Raises:
        UserError: if there is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such exported network")
    onnx, names = path.endswith(".onnx"), [task for task in tasks if task != DETECTION]
    run = run_onnxruntime(path, torch.get_num_threads()) if onnx else torch.jit.load(path).eval()

    def answer(image: torch.Tensor) -> dict:
        tensors = [torch.as_tensor(tensor) for tensor in run(image.numpy() if onnx else image)]
        output, found = dict(zip(names, tensors)), tensors[len(names) :]
        if found:
            parts = [[tensor[found[0] == row] for tensor in found[1:]] for row in range(len(image))]
            output[DETECTION] = [dict(zip(("boxes", "scores", "masks"), part)) for part in parts]
        return output

    return partial(one_by_one, answer) if onnx else answer


def _slices(source, output_dir, preprocessing: Callable, image_size: int) -> torch.Tensor:
    scans, failures = find_scans(source, output_dir)
    if not scans:
        raise UserError(f"{source}: found no scan{''.join(': ' + failure['reason'] for failure in failures[:1])}")
    return collate(list(map(preprocessing, slices_of(scans))))[IMAGE]


def _differences(answers: Mapping, expected: Mapping) -> Iterator[tuple[str, float]]:
    """Name and largest difference of every answer there is; infinite where detections differ in number.

    A detection is compared with the one it overlaps most, since equal scores may be sorted either way.
    """
    for key in [key for key in expected if key in answers and key != DETECTION]:
        yield key, float((answers[key] - expected[key]).abs().max())
    for found, wanted in zip(answers.get(DETECTION, []), expected.get(DETECTION, [])):
        same = len(found["boxes"]) == len(wanted["boxes"])
        partner = box_iou(wanted["boxes"], found["boxes"]).argmax(1) if same and len(found["boxes"]) else []
        for name in ("boxes", "scores", "masks"):
            pairs = zip(found[name][partner], wanted[name]) if same else []
            yield name, max([float((one - two).abs().max()) for one, two in pairs], default=0.0 if same else inf)


def report(parser: ConfigParser, turns: int) -> str:
    """All measurements as text: machine and configuration, then a line for each ratio with its parts and goal."""
    get = parser.get_parsed_content
    shared, step, samples = sharing(parser, turns), training_step(parser, turns), data_pipeline(parser, max(1, turns // 4))
    size, batch_size = get("model")["image_size"], get("batch_size")
    times, parameters = shared["seconds"], shared["parameters"]
    parts = step_parts(parser, max(1, turns // 4))
    totals = {layout: sum(seconds.values()) for layout, seconds in parts.items()}
    rate = batch_size / step["seconds"]["trainer"]
    lines = [
        _machine(get("device")),
        f"{get('model')['backbone']}, {size} x {size} pixels, {len(get('train::data'))} training records, seed {get('seed')}, "
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
        "",
        f"{'part of a step':16}" + "".join(f"{layout:>19}" for layout in LAYOUTS) + "   seconds, forward and backward",
        *(f"{part:16}" + "".join(f"{parts[layout][part]:19.3f}" for layout in LAYOUTS) for part in parts[LAYOUTS[0]]),
        f"channels_last : contiguous_format                        {totals[LAYOUTS[1]] / totals[LAYOUTS[0]]:7.2f}",
    ]
    return "\n".join(lines) + "\n"


def report_backends(parser: ConfigParser, turns: int, exported: Sequence[str] = ()) -> str:
    """The measurement of `backends` as text: machine and configuration, speed, and agreement with torch."""
    get, measured = parser.get_parsed_content, backends(parser, turns, exported)
    size, batch_size, difference = get("model")["image_size"], get("batch_size"), measured["difference"]
    weights = Path(get("checkpoint")).name if get("checkpoint") else "random weights"
    heading = "slices/s   torch : it   torch one by one : it   s of first call"
    lines = [
        f"{_machine(get('device'))}; {', '.join(f'{name} {version(name)}' for name in PACKAGES if name != TORCH)}",
        f"{get('model')['backbone']}, {weights}, {size} x {size} pixels, batch of {batch_size}, "
        f"{measured['detections']:.1f} detections in a slice, median of {turns} turns",
        "",
        f"{'backend':20}{heading}",
        *(
            f"{row:20}{1 / seconds:8.2f}{measured['ratio'][row]:13.2f}{measured['ratio_alone'][row]:24.2f}"
            f"{measured['first_call'][row]:18.1f}"
            for row, seconds in measured["seconds"].items()
        ),
        "",
        "largest difference from torch (goal: at most 0.001)",
        f"{'backend':20}" + "".join(f"{name:>16}" for name in difference[TORCH]),
        *(
            f"{row:20}" + "".join(f"{values[name]:16.1g}" if name in values else f"{'-':>16}" for name in difference[TORCH])
            for row, values in difference.items()
            if row != TORCH
        ),
    ]
    return "\n".join(lines) + "\n"


def pace(source, folder: Path, counts: Sequence[int]) -> Iterator[tuple[str, dict]]:
    """`chestct predict` of the first files of a scan, as many as the first count says, and of NIfTI volumes of its slices.

    Args:
        source: a scan, in HU; its slices run up and down in the longer volumes.

    Yields:
        Name, and seconds (the smaller of wall clock and processor: other jobs delay the one, threads add to the other) of
        "monai" (its import alone), "imports", "first slice" (when it enters the network) and "end", and of the network
        alone; memory and page (report.html) in MB.
    """
    scans, failures = find_scans(source)
    if not scans or not scans[0].hounsfield:
        raise UserError(f"{source}: found no scan in HU{''.join(': ' + failure['reason'] for failure in failures[:1])}")
    scan = scans[0]
    for number, count in enumerate(counts):
        path = folder / (f"{count}.nii.gz" if number or len(scan.files) == 1 else "series")
        if path.suffix:
            order, shape = [*range(len(scan)), *reversed(range(len(scan)))], scan.read_stored(0).shape
            voxels = np.empty((*shape, count), np.int16, order="F")
            for plane, index in zip(np.moveaxis(voxels, -1, 0), cycle(order)):
                plane[:] = scan.read_stored(index)
            nibabel.Nifti1Image(voxels, scan.affine).to_filename(path)
        else:
            path.mkdir()
            for file, _ in scan.sources[:count]:
                (path / Path(file).name).symlink_to(Path(file).resolve())
        name = f"{count} slices, {'NIfTI' if path.suffix else 'files of the scan'}"
        yield name, _timed_prediction(path, folder / f"out{count}")


def _timed_prediction(path: Path, out: Path) -> dict:
    row = _timed() | _timed(str(path), "-o", str(out))
    row |= {"wall": row["end"][0], **{name: min(times) for name, times in row.items() if isinstance(times, list)}}
    return row | {"page": max(page.stat().st_size for page in out.glob("**/report.html")) / 1e6}


def _timed(*arguments: str) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("timed_predict.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report_pace(source, counts: Sequence[int]) -> None:
    """Print the measurement of `pace`, row by row, and its goals."""
    columns, rows = ("wall", "end", "network", "monai", "imports", "first slice", "memory", "page"), {}
    print(_machine("cpu"))
    print("seconds: the smaller of wall clock and processor; network: of its thread; memory, page: MB\n")
    print(f"{'scan':30}" + "".join(f"{name:>13}" for name in (*columns, "end:network")))
    with tempfile.TemporaryDirectory() as folder:
        for name, row in pace(source, Path(folder), counts):
            numbers = "".join(f"{row[column]:13.1f}" for column in columns)
            print(f"{name:30}{numbers}{row['end'] / row['network']:13.2f}", flush=True)
            rows[name] = row
    short, (*_, middle, long), names = next(iter(rows.values())), rows.values(), list(rows)
    goals = {
        f"{names[0]}: 2 x network + imports + 3 s": (short["end"], 2 * short["network"] + short["imports"] + 3),
        f"{names[-1]}: 1.5 x network + 8 s": (long["end"], 1.5 * long["network"] + 8),
        f"memory of {names[-1]}: 1.05 x that of {names[-2]}, MB": (long["memory"], 1.05 * middle["memory"]),
        "largest report.html, MB": (max(row["page"] for row in rows.values()), 10),
        "first slice: import monai + 2 s": (short["first slice"], short["monai"] + 2),
    }
    print()
    for name, (found, allowed) in goals.items():
        print(f"{name:60}{found:9.1f}  (goal: at most {allowed:.1f})")


def _machine(device) -> str:
    versions = environment()
    return (
        f"{versions['cpu']}, {versions['threads']} threads, device {device}; Python {versions['python']}, "
        f"PyTorch {versions['torch']}, MONAI {versions['monai']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlays", nargs="*", metavar="OVERLAY", help="config files merged into configs/train.json")
    parser.add_argument("--dataset_dir", help="folder with a datalist.json; phantom data without it")
    parser.add_argument("--scan", help="file or folder to predict: overlays are merged into configs/inference.json")
    parser.add_argument("--pace", metavar="SCAN", help="a scan in HU, of whose slices `chestct predict` is timed")
    parser.add_argument("--checkpoint", default="", help="weights to predict with; random ones without it")
    parser.add_argument(
        "--exported", nargs="+", default=[], metavar="FILE", help="with --scan: .ts or .onnx of tensor_net, compared as well"
    )
    parser.add_argument("--quick", action="store_true", help="tiny network and few turns: a trial, no result")
    arguments = parser.parse_args()
    overlays, tiny = arguments.overlays, {}
    if arguments.quick and arguments.scan:  # of the preset what describes the network: the rest is of training
        preset, known = (ConfigParser.load_config_file(str(CONFIGS / name)) for name in ("preset_smoke.json", "inference.json"))
        tiny = {id: value for id, value in preset.items() if id in known}
    elif arguments.quick:
        overlays = [*overlays, str(CONFIGS / "preset_smoke.json")]
    turns = 2 if arguments.quick else 12
    with exit_in_one_line(), tempfile.TemporaryDirectory() as folder:  # for what the handlers of the trainer write
        common = {"bundle_root": str(CONFIGS.parent), "output_dir": folder}
        if arguments.pace:
            report_pace(arguments.pace, (2, 3) if arguments.quick else (30, 100, 600))
        elif arguments.scan:
            files = [str(CONFIGS / "inference.json"), *overlays]
            entries = {"input": arguments.scan, "checkpoint": arguments.checkpoint, "device": "cpu", **tiny, **common}
            print(report_backends(open_config(files, **entries), turns, arguments.exported), end="")
        else:
            files = [str(CONFIGS / "train.json"), *overlays]
            print(report(open_config(files, dataset_dir=arguments.dataset_dir, **common), turns), end="")


if __name__ == "__main__":
    main()
