"""Faces of the one model for MONAI Label: its unmodified app `monaibundle` knows bundles that do one thing to a volume.

It runs in an environment of its own, with pydicom 2: see docs/monailabel.md.
"""

from bundle.monailabel.faces import FACES, make_faces
from bundle.monailabel.infer import ClassificationInferer, LesionDetector, LoadVolumed, SegmentationInferer, TakeAnswerd
from bundle.monailabel.train import LoadVolumeSliced, VolumeDataset, publish

__all__ = ["FACES", "ClassificationInferer", "LesionDetector", "LoadVolumeSliced", "LoadVolumed", "SegmentationInferer"]
__all__ += ["TakeAnswerd", "VolumeDataset", "make_faces", "publish"]
