"""The multi-task network: one encoder, a head for each task."""

from bundle.networks.encoders import build_encoder
from bundle.networks.ensemble import EnsembleNet
from bundle.networks.multitask import MultiTaskNet, fitting_tasks, freeze_encoder, load_weights, read_weights
from bundle.networks.novelty import Novelty, read_novelty
from bundle.networks.views import TaskView, TensorView

__all__ = [
    "EnsembleNet",
    "MultiTaskNet",
    "Novelty",
    "TaskView",
    "TensorView",
    "build_encoder",
    "fitting_tasks",
    "freeze_encoder",
    "load_weights",
    "read_novelty",
    "read_weights",
]
