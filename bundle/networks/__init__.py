"""The multi-task network: one encoder, a head for each task."""

from bundle.networks.encoders import build_encoder
from bundle.networks.multitask import MultiTaskNet, TaskView, load_weights, read_weights

__all__ = ["MultiTaskNet", "TaskView", "build_encoder", "load_weights", "read_weights"]
