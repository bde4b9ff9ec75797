"""The images to be answered: found in a folder, read one by one, joined to batches; a bad file stops nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from monai.data import Dataset

from bundle.data.transforms import PICTURES, VOLUMES
from bundle.tasks import IMAGE

logger = logging.getLogger(__name__)

# Keys of the samples here, beside those of `bundle.tasks`.
NAME = "name"  # path below the input folder
SLICE = "slice"  # the slice in [0, 1] before it is resized
FAILURE = "failure"  # why the file could not be read
SAMPLES = "samples"  # of a batch

EXTENSIONS = PICTURES + tuple(extension for extensions in VOLUMES for extension in extensions)


def find_images(source, output_dir) -> list[dict]:
    """List one image, or those of a folder and of all folders in it, in the order of their paths.

    In a folder, images are the files with an extension of `EXTENSIONS` and DICOM files of any name (DICM after 128 bytes);
    the number of other files is logged. Hidden files and DICOMDIR are left out.

    Args:
        source: file or folder.
        output_dir: folder of the results, which must not lie in the source, where the next run would take them as images.

    Returns:
        Records {"image": path, "name": path below the folder, or the file's name}.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the source is a folder without images, or holds output_dir.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"input: {source}: no such file or folder")
    if source.is_file():
        return [{IMAGE: str(source), NAME: source.name}]
    if source.resolve() in (Path(output_dir).resolve(), *Path(output_dir).resolve().parents):
        raise ValueError(f"output_dir: found {output_dir} inside the input {source}, expected a folder outside of it")
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if path.name.lower().endswith(EXTENSIONS) or _is_dicom(path)]
    if not images:
        raise ValueError(f"input: {source}: found no image among {len(files)} files, expected some of {', '.join(EXTENSIONS)}")
    logger.info(f"{source}: {len(images)} images, {len(files) - len(images)} other files")
    return [{IMAGE: str(path), NAME: path.relative_to(source).as_posix()} for path in images]


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"
    except OSError:
        return False


class ImageDataset(Dataset):
    """MONAI's Dataset in which an unreadable file becomes a blank image that says why, under "failure".

    Args:
        data: records of `find_images`.
        transform: preprocessing, which raises ValueError or OSError for a file that cannot be read.
        image_size: side of the images in pixels.
    """

    def __init__(self, data: Sequence[dict], transform: Callable, image_size: int) -> None:
        super().__init__(data, transform)
        self.image_size = image_size

    def _transform(self, index: int):
        try:
            return super()._transform(index)
        except Exception as error:
            cause = error
            while cause.__cause__ is not None:  # MONAI wraps what a transform raises
                cause = cause.__cause__
            if not isinstance(cause, (ValueError, OSError)):
                raise
            blank = torch.zeros(1, self.image_size, self.image_size)
            return {**self.data[index], IMAGE: blank, FAILURE: str(cause)}


def collate(samples: Sequence[dict]) -> dict:
    """Join images to a batch {"image": (B, 1, S, S), "samples": the samples themselves, which know the way back}."""
    return {IMAGE: torch.stack([torch.as_tensor(sample[IMAGE]) for sample in samples]), SAMPLES: list(samples)}
