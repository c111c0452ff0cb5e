"""The detector's network: its size, its cells, and its forms for training and serving."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from training.detector.network import Backbone, DepthwiseConv, PersonDetector, cells, decode, normalised


def test_it_is_small():
    model = PersonDetector().eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 416, 416))
    assert sum(p.numel() for p in model.parameters()) < 2.6e6
    assert counter.get_total_flops() / 2 < 1.3e9


def test_cells_are_ordered_by_stride_and_row():
    centres, strides = cells(64, 96)
    assert strides.tolist() == [8.0] * 96 + [16.0] * 24 + [32.0] * 6
    assert centres[:2].tolist() == [[4, 4], [12, 4]]
    assert centres[12].tolist() == [4, 12]
    assert centres[-1].tolist() == [80, 48]


def test_boxes_are_decoded_from_known_outputs():
    centres, strides = cells(32, 32)
    distances = torch.zeros(1, len(centres), 4)
    distances[0, -1] = torch.tensor([0.5, 0.25, 2.0, 100.0]).log()
    boxes = decode(distances, centres, strides)
    assert boxes[0, 0].tolist() == [4 - 8, 4 - 8, 4 + 8, 4 + 8]
    assert boxes[0, -1, :3].tolist() == pytest.approx([16 - 16, 16 - 8, 16 + 64])
    assert boxes[0, -1, 3] < 16 + 56 * 32  # an output gone wild stays finite


def test_outputs_match_the_cells():
    logits, boxes = PersonDetector(16).eval()(normalised(torch.zeros(2, 64, 96, 3, dtype=torch.uint8)))
    assert logits.shape == (2, 126)
    assert boxes.shape == (2, 126, 4)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_form_for_training_gives_the_same_numbers_and_gradients(kernel, stride):
    torch.manual_seed(0)
    conv = DepthwiseConv(6, kernel, stride)
    x = torch.randn(2, 6, 8, 10, requires_grad=True)
    found = []
    for training in (True, False):
        conv.train(training)
        y = conv(x)
        gradients = torch.autograd.grad((y * torch.arange(y.numel()).reshape(y.shape)).sum(), (x, *conv.parameters()))
        found.append((y, *gradients))
    assert found[0][0].shape == (2, 6, 8 // stride, 10 // stride)
    for trained, served in zip(*found, strict=True):
        torch.testing.assert_close(trained, served, rtol=1e-4, atol=1e-3)


def test_imagenet_weights_are_read_with_their_normalisation_folded(tmp_path):
    torch.manual_seed(0)
    weights = _lite0_weights()
    torch.save(weights, tmp_path / "lite0.pth")
    backbone = Backbone().eval()
    backbone.load_imagenet(tmp_path / "lite0.pth")
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        found = backbone.blocks[0](functional.relu6(backbone.stem(functional.pad(x, (0, 1, 0, 1)))))
        y = functional.pad(x.flip(1), (0, 1, 0, 1))  # theirs takes RGB
        y = functional.relu6(_normed(functional.conv2d(y, weights["_conv_stem.weight"], stride=2), weights, "_bn0"))
        y = functional.conv2d(y, weights["_blocks.0._depthwise_conv.weight"], padding=1, groups=32)
        y = functional.relu6(_normed(y, weights, "_blocks.0._bn1"))
        y = _normed(functional.conv2d(y, weights["_blocks.0._project_conv.weight"]), weights, "_blocks.0._bn2")
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)


def test_the_stem_is_not_trained_and_the_rest_is():
    model = PersonDetector(16)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    first = ("backbone.stem.", "backbone.blocks.0.", "backbone.blocks.1.", "backbone.blocks.2.")
    assert fixed == {name for name, _ in model.named_parameters() if name.startswith(first)} != set()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules())


def _normed(x, weights, name):
    mean, variance, gain, offset = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(x, mean, variance, gain, offset, eps=1e-3)


def _lite0_weights():
    """Random weights under the names of the package's file."""
    weights = {}

    def add(convolution, name, norm):
        weights[f"{name}.weight"] = torch.randn_like(convolution.weight) * 0.3
        for part in ("weight", "running_var"):
            weights[f"{norm}.{part}"] = torch.rand(len(convolution.weight)) + 0.5
        for part in ("bias", "running_mean"):
            weights[f"{norm}.{part}"] = torch.randn(len(convolution.weight))

    backbone = Backbone()
    add(backbone.stem, "_conv_stem", "_bn0")
    for number, block in enumerate(backbone.blocks):
        if block.expand is not None:
            add(block.expand, f"_blocks.{number}._expand_conv", f"_blocks.{number}._bn0")
        add(block.depthwise, f"_blocks.{number}._depthwise_conv", f"_blocks.{number}._bn1")
        add(block.project, f"_blocks.{number}._project_conv", f"_blocks.{number}._bn2")
    return weights
