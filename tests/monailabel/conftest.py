"""Faces of the smallest network, and volumes of any orientation to answer."""

from pathlib import Path

import nibabel
import pytest
import torch
from chests import AFFINE, labelled_chest
from monai.bundle import ConfigParser

from bundle.monailabel import make_faces

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def source(checkpoint):
    """configs/inference.json for the smallest network, parsed."""
    parser = ConfigParser()
    parser.read_config(ROOT / "configs/inference.json")
    parser.read_meta(ROOT / "configs/metadata.json")
    parser["checkpoint"] = str(checkpoint)
    return parser


@pytest.fixture(scope="session")
def faces(checkpoint, tmp_path_factory):
    """Face -> folder; only to be read."""
    made = make_faces(tmp_path_factory.mktemp("faces"), checkpoint)
    return {face.name.removeprefix("chest_ct_"): face for face in made}


@pytest.fixture(scope="session")
def write_volume():
    """Function that writes a body with lungs and a lesion in one of them, on LPS axes or others, and its label."""

    def write(path, axes="LPS", shape=(64, 56, 6), noise=20.0):
        hu, lesion = labelled_chest(shape, noise)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.axcodes2ornt(axes)
        )
        for name, values in (("", hu), ("_label", lesion)):
            image = nibabel.Nifti1Image(values, AFFINE).as_reoriented(turn)
            nibabel.save(image, path.with_name(path.name.replace(".nii", f"{name}.nii")))
        return path, path.with_name(path.name.replace(".nii", "_label.nii"))

    return write


@pytest.fixture(scope="session")
def ask():
    """Function that does with a face what MONAI Label does: prepare a volume, load the network, answer."""

    def ask(face, path, changes=None, dropout=0.0, sureness=1):
        parser = ConfigParser()
        parser.read_config(face / "configs/inference.json")
        parser["device"], parser["bundle_root"] = "cpu", str(face)
        parser["network_def"]["dropout"] = dropout
        for id, value in (changes or {}).items():
            parser[id] = value
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(face / "models/model.pt", weights_only=True))
        network.heads["segmentation"].output[0].weight.data *= sureness  # a fresh network says 0.5 everywhere
        network.train(dropout > 0)
        volume = parser.get_parsed_content("preprocessing")({"image": str(path)})["image"]
        if "detector" in parser:
            detector = parser.get_parsed_content("detector")
            detector.network = network
            with torch.no_grad():
                return detector(volume[None], use_inferer=True)[0]
        with torch.no_grad():
            return parser.get_parsed_content("inferer")(volume[None], network)[0]

    return ask
