"""LPN as it is served: the same heatmaps from pixels, computed as ONNX Runtime does it fastest (training/README.md).

Normalisation is one difference, its division being part of the first convolution. The last upsampling gives four
phases of the map; what follows it works place by place, hence on each phase, and only heatmaps are interleaved.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.lpn import LPN, GroupedUpsampling
from training.pixels import MEAN, STD

_KERNEL_ROWS = ((3, 1), (2, 0))
"""Of a transposed convolution k4 s2 p1: those of input rows i - 1 and i in output row 2i, and of i and i + 1 in 2i + 1."""


class ServedLPN(nn.Module):
    """Crops [N, H, W, 3] (uint8, BGR) → heatmaps [N, K, H/4, W/4], as `model` gives them of normalised crops."""

    def __init__(self, model: LPN) -> None:
        super().__init__()
        self.first = copy.deepcopy(model.conv1)
        self.first.weight = nn.Parameter(model.conv1.weight / (torch.tensor(STD) * 255)[:, None, None])
        self.mean = nn.Buffer(torch.tensor(MEAN) * 255)
        self.stem = nn.Sequential(model.bn1, nn.ReLU(), model.maxpool)
        self.body = nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4, model.deconv_layers[:6])
        unit = cast(
            "tuple[GroupedUpsampling, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]", tuple(model.deconv_layers)[6:11]
        )
        upsampling, upsampling_norm, relu, pointwise, norm = unit
        self.phases = nn.ModuleList(
            nn.Sequential(*_phase(upsampling, upsampling_norm, row, column), relu) for row in (0, 1) for column in (0, 1)
        )
        self.heatmaps = nn.Sequential(fuse_conv_bn_eval(pointwise, norm), relu, model.final_layer)

    def forward(self, crops: Tensor) -> Tensor:
        # Of whole rows: with the three channels as its innermost dimension the difference takes 15 times as long.
        rows = crops.flatten(2).float() - self.mean.repeat(crops.shape[2])
        x = self.first(rows.reshape(-1, *crops.shape[1:]).permute(0, 3, 1, 2))
        x = self.body(self.stem(x))
        phases = torch.cat([self.heatmaps(phase(x)) for phase in self.phases], dim=1)
        height, width, keypoints = x.shape[2], x.shape[3], phases.shape[1] // 4
        # Columns, then rows: to move one dimension at a time takes a fifth of the time.
        wide = phases.reshape(-1, 2, 2, keypoints, height, width).permute(0, 1, 3, 4, 5, 2).flatten(4)
        return wide.permute(0, 2, 3, 1, 4).reshape(-1, keypoints, 2 * height, 2 * width)


def _phase(upsampling: GroupedUpsampling, norm: nn.BatchNorm2d, row: int, column: int) -> tuple[nn.Module, nn.Module]:
    """Padding and convolution that give every second row and column, from (row, column) on, of a normalised upsampling."""
    channels, groups = upsampling.out_channels, upsampling.groups
    convolution = nn.Conv2d(upsampling.in_channels, channels, 2, groups=groups, bias=False).eval()
    kernel = upsampling.weight[:, :, _KERNEL_ROWS[row]][..., _KERNEL_ROWS[column]]
    convolution.weight = nn.Parameter(kernel.reshape(channels, -1, 2, 2))
    return nn.ZeroPad2d((1 - column, column, 1 - row, row)), fuse_conv_bn_eval(convolution, norm)
