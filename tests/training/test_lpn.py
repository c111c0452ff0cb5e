"""The network: its size, its names, and the CPU forms of two layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from app.vision import box, heatmap
from training.keypoints import MIRROR
from training.lpn import LPN, DepthwiseConv, GroupedUpsampling, depth_of
from training.pixels import normalised

REFERENCE = Path(__file__).parents[1] / "data/reference"


@pytest.mark.parametrize(
    ("depth", "parameters", "gmac", "tensors"),
    [(50, 2_911_153, 1.070, 466), (101, 5_353_458, 1.507, 908), (152, 7_377_459, 1.946, 1350)],
)
def test_each_depth_has_the_papers_size(depth, parameters, gmac, tensors):
    model = LPN(depth).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    assert depth_of(model.state_dict()) == depth
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        assert model(torch.zeros(1, 3, 256, 192)).shape == (1, 17, 64, 48)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.001)


def test_without_attention_it_has_the_papers_smaller_size():
    assert sum(parameter.numel() for parameter in LPN(50, attention=False).parameters()) == 2_732_689


@pytest.fixture(scope="module")
def reference_model():
    weights = torch.load(REFERENCE / "lpn_50_256x192_fixture_fp16.pth", weights_only=True)
    model = LPN(50).eval()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, strict=True)
    return model


@pytest.fixture(scope="module")
def parity():
    with np.load(REFERENCE / "parity.npz") as content:
        return dict(content)


def test_a_checkpoint_in_the_authors_layout_gives_the_authors_heatmaps(reference_model, parity):
    chosen = parity["heatmap_boxes"]
    crops = normalised(torch.from_numpy(parity["crop_bgr_u8"][chosen]))
    with torch.inference_mode():
        plain, mirrored = reference_model(crops).numpy(), reference_model(crops.flip(3)).numpy()
    np.testing.assert_allclose(plain, parity["heatmaps"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(mirrored, parity["heatmaps_of_flipped_input"], rtol=0, atol=1e-4)


def test_the_papers_configuration_gives_the_authors_keypoints_for_all_boxes(reference_model, parity):
    crops = normalised(torch.from_numpy(parity["crop_bgr_u8"]))
    with torch.inference_mode():
        plain, mirrored = reference_model(crops).numpy(), reference_model(crops.flip(3)).numpy()
    found = heatmap.decode(heatmap.average_with_mirrored(plain, mirrored, MIRROR, 1.0), 160.0, True)
    centres, sizes = box.centres_and_sizes(parity["box_xywh"], 192 / 256)
    places = box.to_picture(found[..., :2], centres, sizes, 48, 64)
    np.testing.assert_allclose(places, parity["all_preds"][..., :2], rtol=0, atol=0.01)
    np.testing.assert_allclose(found[..., 2], parity["all_preds"][..., 2], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("channels", "out_channels"), [(512, 256), (256, 256)])
def test_the_upsampling_of_training_is_the_transposed_convolution(channels, out_channels):
    layer = GroupedUpsampling(channels, out_channels)
    _assert_same_in_training(layer, torch.randn(2, channels, 6, 5))


def test_the_strided_depthwise_convolution_of_training_is_the_plain_one():
    _assert_same_in_training(DepthwiseConv(32, 2), torch.randn(2, 32, 8, 6))


def _assert_same_in_training(layer, x):
    outputs, gradients = [], []
    for training in (True, False):
        layer.train(training)
        layer.zero_grad()
        given = x.clone().requires_grad_()
        output = layer(given)
        (output * torch.arange(output.numel()).view(output.shape).sin()).sum().backward()
        outputs.append(output.detach())
        gradients.append((given.grad, layer.weight.grad.clone()))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for own, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="not the weights of an LPN"):
        depth_of({"conv1.weight": torch.zeros(1)})
