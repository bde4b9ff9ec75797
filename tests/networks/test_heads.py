import pytest
import torch

from bundle.errors import UserError
from bundle.networks.heads import ClassificationHead, DenseHead

VGG = {"channels": (4, 6, 8, 10, 12, 14), "strides": (1, 2, 4, 8, 16, 32)}
TIMM = {"channels": (6, 8, 10, 12, 14), "strides": (2, 4, 8, 16, 32)}


def pyramid(channels, strides, size=64):
    return [torch.rand(2, c, size // s, size // s, requires_grad=True) for c, s in zip(channels, strides)]


# [arguments, skips taken in, expected shape], for 64 x 64 pixels
CASES = [
    [{**VGG, "decoder_channels": (16, 8, 8, 4, 4)}, [4, 3, 2, 1, 0], (2, 1, 64, 64)],
    [{**VGG, "decoder_channels": (16,)}, [4], (2, 1, 64, 64)],
    [{**VGG, "decoder_channels": (16, 8, 8, 4, 4), "skips": False}, [-1] * 5, (2, 1, 64, 64)],
    [{**TIMM, "decoder_channels": (16, 8, 8, 4, 4), "out_channels": 3}, [3, 2, 1, 0, -1], (2, 3, 64, 64)],
    [{**TIMM, "decoder_channels": (16, 8, 8), "out_channels": 3}, [3, 2, 1], (2, 3, 64, 64)],
    [{**TIMM, "decoder_channels": (16, 8), "skips": False}, [-1] * 2, (2, 1, 64, 64)],
]


@pytest.mark.parametrize(("arguments", "skips", "shape"), CASES)
def test_decoder_answers_at_full_resolution_from_the_skips_it_has(arguments, skips, shape):
    head, features = DenseHead(**arguments), pyramid(arguments["channels"], arguments["strides"])
    assert head.skips == skips
    output = head(features)
    assert tuple(output.shape) == shape
    output.square().sum().backward()
    used = [feature.grad is not None and bool(feature.grad.any()) for feature in features]
    assert used == [level in skips or level == len(features) - 1 for level in range(len(features))]


def test_the_sub_pixel_convolution_starts_without_checkerboard():
    head, features = DenseHead(**TIMM, decoder_channels=(16, 8, 8), out_channels=2), pyramid(**TIMM)
    blocks = head(features).detach().unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(blocks, blocks[..., :1, :1].expand_as(blocks))
    assert blocks.std() > 0.01


@pytest.mark.parametrize("count", [0, 6])
def test_a_number_of_decoder_channels_that_does_not_fit_is_refused(count):
    expected = rf"decoder_channels: found {count} \(.*\), expected 1 to 5 for an encoder of stride 32"
    with pytest.raises(UserError, match=expected):
        DenseHead(**VGG, decoder_channels=[8] * count)


def test_dropout_of_a_decoder_keeps_its_weights_their_names_and_its_answer_in_evaluation():
    plain, features = DenseHead(**TIMM, decoder_channels=(16, 8, 8)).eval(), pyramid(**TIMM)
    head = DenseHead(**TIMM, decoder_channels=(16, 8, 8), dropout=0.5).eval()
    head.load_state_dict(plain.state_dict())
    torch.testing.assert_close(head(features), plain(features))
    torch.testing.assert_close(torch.jit.script(head)(features), plain(features))
    for module in head.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    assert (head(features) - head(features)).abs().max() > 1e-3


@pytest.mark.parametrize("arguments", [{}, {"hidden": (8,), "dropout": 0.0}, {"hidden": ()}])
def test_classification_sees_the_deepest_features_wherever_they_are(arguments):
    head, features = ClassificationHead(14, 3, **arguments).eval(), pyramid(**VGG)
    assert tuple(head(features).shape) == (2, 3)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head) == len(arguments.get("hidden", (256, 64))) + 1
    torch.testing.assert_close(head(features), head([features[-1].roll(1, dims=-1)]))
