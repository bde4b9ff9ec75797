"""The network run by onnxruntime or openvino instead of torch: the same answers, faster on a CPU."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from bundle.errors import UserError
from bundle.networks import MultiTaskNet
from bundle.networks.detection import MaskRCNNHead
from bundle.names import EMBEDDING

PACKAGES = {"torch": (), "onnxruntime": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}

for exporter in ("onnxscript", "onnx_ir"):
    logging.getLogger(exporter).setLevel(logging.WARNING)  # it logs every step of its optimisation


def accelerate(network: MultiTaskNet, backend: str = "torch", amp: bool = False) -> nn.Module:
    """Return the network, or one with the same answers that runs in another library, on the CPU with float32.

    Weights are loaded before its first call. A backend that is unknown, not installed, or unfit for `amp` or the device is a UserError.
    """
    if backend not in PACKAGES:
        raise UserError(f"backend: found {backend!r}, expected one of {', '.join(PACKAGES)}")
    if backend == "torch":
        return network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    if absent := [package for package in PACKAGES[backend] if find_spec(package) is None]:
        packages = " and ".join(absent)
        raise UserError(f"backend: {backend} needs {packages}, not installed: pip install 'chest-ct-multitask[export]'")
    if amp:
        raise UserError(f"amp: found true with backend {backend}, expected false; it calculates with float32")
    device = next(network.parameters()).device
    if device.type != "cpu":
        raise UserError(f"backend: found {backend} with device {device}, expected device cpu, or backend torch")
    return ExportedNet(network, backend)


def one_by_one(network: Callable[[torch.Tensor], dict], image: torch.Tensor) -> dict:
    """Call a network in evaluation mode with each image of a batch and join the answers."""
    answers = [network(row) for row in image.split(1)]
    joined = {key: [answer[key] for answer in answers] for key in answers[0]}
    return {key: sum(parts, []) if isinstance(parts[0], list) else torch.cat(parts) for key, parts in joined.items()}


class ExportedNet(nn.Module):
    """A network whose convolutions run in another library; anchors, suppression and the pooling of regions stay in torch.

    Exported are the encoder with the dense heads and feature pyramids, and of each Mask R-CNN the box head and the mask head.
    The first call exports for the size of its images, which takes some seconds; weights loaded later have no effect. Images
    are processed one by one: on a CPU a batch is not faster and needs more memory.
    """

    def __init__(self, network: MultiTaskNet, backend: str) -> None:
        super().__init__()
        self.network, self.backend, self.size = network, backend, None
        self.eval()

    def forward(self, image: torch.Tensor) -> dict:
        """Answer every active task: see `MultiTaskNet.forward`, in evaluation mode and without gradients."""
        self.network._check(tuple(image.shape))
        with torch.no_grad():
            if self.size != image.shape[1:]:
                self._export(image.shape[1:])
            return one_by_one(self._answer, torch.as_tensor(image))

    def _export(self, size: torch.Size) -> None:
        self.trunk = Exported(_Trunk(self.network), torch.zeros(2, *size), self.backend)
        heads = self.network.heads.items()
        self.detectors = nn.ModuleDict({task: deepcopy(head) for task, head in heads if isinstance(head, MaskRCNNHead)})
        for detector in self.detectors.values():
            parts = detector.roi_heads
            channels = parts.mask_head[0][0].in_channels
            for name in ("box", "mask"):
                head, predictor, pool = (getattr(parts, f"{name}_{part}") for part in ("head", "predictor", "roi_pool"))
                regions = torch.zeros(2, channels, *pool.output_size)
                setattr(parts, f"{name}_head", Exported(nn.Sequential(head, predictor), regions, self.backend))
                setattr(parts, f"{name}_predictor", nn.Identity())
        self.size = size

    def _answer(self, image: torch.Tensor) -> dict:
        outputs = iter(self.trunk(image))
        answer = {EMBEDDING: next(outputs)}
        for task in self.network.heads:
            if task in self.detectors:
                pyramid = OrderedDict((str(level), next(outputs)) for level in self.detectors[task].levels)
                answer[task] = self.detectors[task].detect(pyramid, image)
            else:
                answer[task] = next(outputs)
        return answer


class Exported(nn.Module):
    """A module, from one tensor to one or several with as many rows, exported to ONNX and run by another library with float32.

    `example` has at least 2 rows; later inputs may differ in the number of rows only.
    """

    def __init__(self, module: nn.Module, example: torch.Tensor, backend: str) -> None:
        super().__init__()
        threads = torch.get_num_threads()
        with TemporaryDirectory() as folder:
            path = str(Path(folder) / "module.onnx")
            shapes = ({0: torch.export.Dim("rows")},)
            # One file, read at once: a separate one with the weights may be mapped, and the folder is removed.
            options = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False, "verbose": False}
            torch.onnx.export(module.eval(), (example,), path, **options)
            self.run = {"onnxruntime": run_onnxruntime, "openvino": _openvino}[backend](path, threads)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Outputs of the module for x (rows, ...)."""
        # A region head may get no region; neither library documents that it takes an empty array.
        array = (x if len(x) else x.new_zeros(1, *x.shape[1:])).numpy(force=True)
        outputs = tuple(torch.from_numpy(output)[: len(x)] for output in self.run(array))
        return outputs if len(outputs) > 1 else outputs[0]


class _Trunk(nn.Module):
    """The part of the network whose input is the whole image: the embedding, then head by head an answer or a pyramid."""

    def __init__(self, network: MultiTaskNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.network.encoder(image)
        outputs = [self.network.embed(features)]
        for head in self.network.heads.values():
            outputs += head.pyramid(features).values() if isinstance(head, MaskRCNNHead) else [head(features)]
        return tuple(outputs)


def run_onnxruntime(path: str, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A file of ONNX with one input as a function of arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns at every call of an exported Mask R-CNN but the first
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its idle threads would slow torch down
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda array: session.run(None, {argument.name: array})


@cache
def _openvino_core():
    """The one core of this process: each gives its thread a stack for signals, and freeing two in turn brings back a freed stack."""
    import openvino

    return openvino.Core()


def _openvino(path: str, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bf16 where the processor has it
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",  # one request at a time
    }
    request = _openvino_core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda array: list(request.infer([array], share_inputs=True).to_tuple())
