import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

import bundle
from bundle.errors import UserError
from bundle.monailabel import make_faces
from bundle.monailabel.faces import main
from bundle.networks import MultiTaskNet

CONFIGS = Path(__file__).parents[2] / "configs"
KNOBS = ("tasks", "backbone", "decoder_channels", "skips", "detection", "image_size", "window", "classes", "segmentation_classes")


def config(face, name="inference"):
    return json.loads((face / f"configs/{name}.json").read_text())


def test_the_faces_are_the_bundle_as_it_is_now(faces, source):
    assert sorted(faces) == ["classification", "detection", "segmentation"]
    expected = source.get_parsed_content("multitask_net").state_dict()
    for name, face in faces.items():
        made = config(face)
        for knob in KNOBS:
            assert made[knob] == source[knob], (name, knob)
        assert made["slice_preprocessing"] == source["preprocessing"]
        renamed = json.dumps(source["postprocessing"]).replace("@preprocessing", "@slice_preprocessing")
        assert made["evaluator"]["inferer"] == "@slice_inferer" and made["slice_inferer"] == source["inferer"]
        assert made["slice_postprocessing"] == json.loads(renamed)
        parser = ConfigParser({**made, "bundle_root": str(face)})
        network = parser.get_parsed_content("network_def")
        assert type(network) is MultiTaskNet
        weights = torch.load(face / "models/model.pt", weights_only=True)
        assert weights.keys() == network.state_dict().keys() == expected.keys()
        network.load_state_dict(weights)
        assert config(face, "metadata")["version"] == bundle.__version__
        assert (face / "bundle/networks/multitask.py").is_file()


def test_default_limits_are_those_of_the_bundle(faces, source):
    for name in ("segmentation", "detection"):
        limits = config(faces[name])["displayable_configs"]
        assert limits["score_threshold"] == source["score_threshold"]
    assert config(faces["segmentation"])["displayable_configs"]["lesion_threshold"] == 0.5


def test_what_monai_label_reads_first_from_the_metadata(faces):
    channels = {}
    for name, face in faces.items():
        formats = config(face, "metadata")["network_data_format"]
        key, image = next(iter(formats["inputs"].items()))
        assert (key, len(image["spatial_shape"])) == ("image", 3)
        key, pred = next(iter(formats["outputs"].items()))
        assert key == "pred"
        channels[name] = pred["channel_def"]
    assert channels == {
        "segmentation": {"0": "background", "1": "lesion"},
        "classification": {"0": "other", "1": "COVID-19", "2": "lung cancer"},
        "detection": {"0": "lesion"},
    }


def test_a_face_keeps_nothing_that_it_does_not_use(faces):
    for face in faces.values():
        assert not {"worklist", "dataset_dir", "input", "run", "network"} & config(face).keys()
    train = config(faces["segmentation"], "train")
    assert not {"datalist", "records", "dataset_dir", "stages", "training"} & train.keys()
    assert train["tasks"] == {"segmentation": 1.0}
    assert all("_target_" in handler for handler in train["train"]["handlers"])


def test_dropout_that_monai_label_sets_reaches_the_decoder_and_the_inferer(faces):
    for dropout in (0.0, 0.3):
        parser = ConfigParser({**config(faces["segmentation"]), "bundle_root": str(faces["segmentation"])})
        parser["network_def"]["dropout"] = dropout
        head = parser.get_parsed_content("network_def").heads["segmentation"]
        rates = {module.p for module in head.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {dropout}
        assert parser.get_parsed_content("inferer").monte_carlo is (dropout > 0)


def test_weights_that_were_trained_on_are_kept_until_others_are_named(checkpoint, tmp_path):
    face = make_faces(tmp_path, checkpoint)[0]
    trained = torch.load(checkpoint, weights_only=True)
    trained["heads.segmentation.output.0.bias"] += 1
    torch.save(trained, face / "models/model.pt")
    make_faces(tmp_path)
    kept = torch.load(face / "models/model.pt", weights_only=True)
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
    make_faces(tmp_path, checkpoint)
    assert (face / "models/model.pt").read_bytes() == checkpoint.read_bytes()


def test_a_config_of_another_network_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "own.json").write_text(json.dumps({"classes": ["healthy", "ill", "dead"]}))
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "faces"), "--checkpoint", str(checkpoint), "--config", str(tmp_path / "own.json")])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: classes: found ['healthy', 'ill', 'dead'], expected ['other', 'COVID-19', 'lung cancer'], as")
    assert not (tmp_path / "faces/chest_ct_segmentation/models/model.pt").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("nowhere.json", "nowhere.json: cannot be read .*, expected JSON or YAML"),
        (CONFIGS / "multi_gpu_train.json", "_train.json: found 'train#dataloader#sampler', which does not fit inference"),
    ],
)
def test_a_config_that_is_not_there_or_tells_how_to_train_is_refused(checkpoint, tmp_path, config, words):
    with pytest.raises(UserError, match=words):
        make_faces(tmp_path, checkpoint, [config])


def test_a_network_without_the_head_of_a_face_is_refused(save_smoke, tmp_path):
    save_smoke(tmp_path / "one.pt", tasks={"segmentation": 1.0})
    with pytest.raises(ValueError, match="tasks: found segmentation, expected classification among them for chest_ct_class"):
        make_faces(tmp_path / "faces", tmp_path / "one.pt")
