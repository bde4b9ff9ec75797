"""From images to predictions and files."""

from bundle.inference.images import ImageDataset, collate, find_images
from bundle.inference.outputs import BoxesToFiled, PredictionWriter, SplitBatch

__all__ = ["BoxesToFiled", "ImageDataset", "PredictionWriter", "SplitBatch", "collate", "find_images"]
