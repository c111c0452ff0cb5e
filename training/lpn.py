"""The Lightweight Pose Network of "Simple and Lightweight Human Pose Estimation" (Zhang, Tang, Wu, arXiv 1911.10346).

A SimpleBaseline of depthwise bottlenecks with global-context attention. Parameter names are those of the authors'
checkpoints (github.com/zhang943/lpn-pytorch), so that theirs load with `strict=True`.
"""

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Depth = Literal[50, 101, 152]

BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
HEAD_CHANNELS = 256
HEATMAP_STRIDE = 4


class GlobalContext(nn.Module):
    """GC block: softmax-attention pooling over the map, a bottleneck transform, added to every place. [N, C, H, W] → same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 16)
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        back = nn.Conv2d(hidden, channels, 1)
        # The transform starts at zero, so that each block starts as the identity (GCNet's initialisation).
        nn.init.zeros_(back.weight)
        nn.init.zeros_(back.bias)  # type: ignore[arg-type]
        self.channel_add_conv = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), back)

    def forward(self, x: Tensor) -> Tensor:
        # Shapes are given by numbers, so that the exported graph holds no shape arithmetic. Places × channels is how the
        # runtime's int8 convolutions lay out a map, and PyTorch's in channels-last: no copy. Softmax ignores the mask's bias.
        channels, places = x.shape[1], x.shape[2] * x.shape[3]
        values = x.permute(0, 2, 3, 1).reshape(-1, places, channels)
        attention = (values @ self.conv_mask.weight.reshape(channels, 1)).reshape(-1, 1, places).softmax(dim=2)
        context = (attention @ values).reshape(-1, channels)
        reduce, norm, _, back = cast("tuple[nn.Conv2d, nn.LayerNorm, nn.ReLU, nn.Conv2d]", tuple(self.channel_add_conv))
        hidden = functional.linear(context, reduce.weight.flatten(1), reduce.bias)
        hidden = functional.relu(functional.layer_norm(hidden, hidden.shape[1:], norm.weight.flatten(), norm.bias.flatten()))
        added = functional.linear(hidden, back.weight.flatten(1), back.bias)
        return x + added.reshape(-1, channels, 1, 1)


class LightweightBottleneck(nn.Module):
    """1×1, 3×3 depthwise, 1×1 with a GC block before the residual sum; expansion 1. [N, C, H, W] → [N, planes, H/s, W/s]."""

    def __init__(self, channels: int, planes: int, stride: int, attention: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = DepthwiseConv(planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.att = GlobalContext(planes) if attention else None
        self.downsample = None
        if stride != 1 or channels != planes:
            self.downsample = nn.Sequential(nn.Conv2d(channels, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.att is not None:
            y = self.att(y)
        return functional.relu(y + shortcut)


def takes_own_forms(x: Tensor) -> bool:
    """Whether training computes `x` by the forms of convolutions below, and not by PyTorch's: measured for CPUs alone."""
    return x.is_cpu


class DepthwiseConv(nn.Conv2d):
    """3×3 depthwise convolution: [N, C, H, W] → [N, C, H/s, W/s].

    While training on a CPU a stride is taken by keeping every second place of the full map: the same numbers, and the
    backward pass is 6 to 12 times faster than oneDNN's strided one (training/MEASURED.md).
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1) or not self.training or not takes_own_forms(x):
            return super().forward(x)
        full = functional.conv2d(x, self.weight, padding=1, groups=self.groups)
        return full[:, :, :: self.stride[0], :: self.stride[1]].contiguous(memory_format=torch.channels_last)


class GroupedUpsampling(nn.ConvTranspose2d):
    """Transposed convolution k4 s2 p1 with as many groups as output channels: [N, C, H, W] → [N, O, 2H, 2W].

    While training on a CPU the four phases of the output are depthwise 3×3 convolutions of the input, interleaved at the
    end: the same sums, and 5 to 11 times faster there than a grouped transposed convolution (training/MEASURED.md).
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 4, stride=2, padding=1, groups=out_channels, bias=False)
        # Output row 2i + a sums input rows i - 1, i, i + 1 by these kernel rows; 4 stands for zero.
        self.register_buffer("phase_rows", torch.tensor([[3, 1, 4], [4, 2, 0]]), persistent=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.training or not takes_own_forms(x):
            return super().forward(x, output_size)
        n, channels, height, width = x.shape
        rows = self.get_buffer("phase_rows")
        kernel = functional.pad(self.weight, (0, 1, 0, 1))
        kernel = kernel[:, :, rows[:, None, :, None], rows[None, :, None, :]]  # [C, 1, 2, 2, 3, 3]
        phases = []
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            phase = functional.conv2d(x, kernel[:, :, a, b], padding=1, groups=channels).permute(0, 2, 3, 1)
            if channels != self.out_channels:  # input channels 2g and 2g + 1 make output channel g
                phase = phase.reshape(n, height, width, self.out_channels, -1).sum(4)
            phases.append(phase)
        rows_and_columns = torch.stack(phases).view(2, 2, n, height, width, self.out_channels).permute(2, 3, 0, 4, 1, 5)
        return rows_and_columns.reshape(n, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)


class LPN(nn.Module):
    """Pictures [N, 3, H, W] (normalised) → heatmaps [N, keypoints, H/4, W/4]. H and W must be multiples of 16."""

    def __init__(self, depth: Depth = 50, keypoints: int = 17, attention: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = self._stages(depth, attention)
        layers: list[nn.Module] = []
        for channels in (512, HEAD_CHANNELS):
            layers += [
                GroupedUpsampling(channels, HEAD_CHANNELS),
                nn.BatchNorm2d(HEAD_CHANNELS),
                nn.ReLU(),
                nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 1, bias=False),
                nn.BatchNorm2d(HEAD_CHANNELS),
                nn.ReLU(),
            ]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(HEAD_CHANNELS, keypoints, 1)
        self._initialise()

    @staticmethod
    def _stages(depth: Depth, attention: bool) -> list[nn.Sequential]:
        stages = []
        channels = 64
        for planes, stride, blocks in zip((64, 128, 256, 512), (1, 2, 2, 1), BLOCKS_PER_STAGE[depth], strict=True):
            stage = [LightweightBottleneck(channels, planes, stride, attention)]
            stage += [LightweightBottleneck(planes, planes, 1, attention) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            channels = planes
        return stages

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, GroupedUpsampling) or (isinstance(module, nn.Conv2d) and module.bias is None):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, LightweightBottleneck):
                nn.init.zeros_(module.bn3.weight)  # each block starts as its shortcut
        nn.init.normal_(self.final_layer.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        heatmaps: Tensor = self.final_layer(self.deconv_layers(x))
        return heatmaps


def depth_of(weights: dict[str, Tensor]) -> Depth:
    """The depth of the LPN whose state these weights are. Raises ValueError for any other network's."""
    blocks = tuple(len({key.split(".")[1] for key in weights if key.startswith(f"layer{n}.")}) for n in (1, 2, 3, 4))
    for depth in get_args(Depth):
        if BLOCKS_PER_STAGE[depth] == blocks:
            return cast("Depth", depth)
    raise ValueError(f"not the weights of an LPN-50, 101 or 152: the stages have {blocks} blocks")
