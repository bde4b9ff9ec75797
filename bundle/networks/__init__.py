"""The multi-task network: one encoder, a head for each task; and its checkpoints."""

from bundle.networks.encoders import Encoder
from bundle.networks.multitask import EnsembleNet, MultiTaskNet, freeze_encoder
from bundle.networks.novelty import Novelty, read_novelty
from bundle.networks.views import TaskView, TensorView
from bundle.networks.weights import load_weights, read_weights, shipped_checkpoint

__all__ = ["Encoder", "EnsembleNet", "MultiTaskNet", "Novelty", "TaskView", "TensorView", "freeze_encoder", "load_weights"]
__all__ += ["read_novelty", "read_weights", "shipped_checkpoint"]
