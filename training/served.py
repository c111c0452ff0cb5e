"""LPN as it is served: the same heatmaps from pixels, computed as ONNX Runtime does it fastest (training/MEASURED.md).

Normalisation is one difference, its division being part of the first convolution. The last upsampling gives four
phases of the map; what follows it works place by place, hence on each phase, and only heatmaps are interleaved. Two parts
are fastest in another form in int8: the first convolution and the first upsampling.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.lpn import LPN, GroupedUpsampling
from training.pixels import MEAN, STD

_GROUPS = 16  # of the first upsampling in int8: 8 and 32 take longer
_KERNEL_ROWS = ((3, 1), (2, 0))
"""Of a transposed convolution k4 s2 p1: those of input rows i - 1 and i in output row 2i, and of i and i + 1 in 2i + 1."""


class ServedLPN(nn.Module):
    """Crops [N, H, W, 3] (uint8, BGR) → heatmaps [N, K, H/4, W/4], as `model` gives them of normalised crops.

    `for_int8`: in the form that is fastest once it is brought to int8.
    """

    def __init__(self, model: LPN, for_int8: bool = False) -> None:
        super().__init__()
        first, first_norm = cast("tuple[GroupedUpsampling, nn.BatchNorm2d]", tuple(model.deconv_layers)[:2])
        unit = cast(
            "tuple[GroupedUpsampling, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]", tuple(model.deconv_layers)[6:11]
        )
        upsampling, upsampling_norm, relu, pointwise, norm = unit
        self.first = (_FirstOnBlocks if for_int8 else _First)(model.conv1)
        self.stem = nn.Sequential(model.bn1, nn.ReLU(), model.maxpool)
        upsampled = [_Upsampling(first, first_norm)] if for_int8 else [first, first_norm, relu]
        blocks = (model.layer1, model.layer2, model.layer3, model.layer4)
        self.body = nn.Sequential(*blocks, *upsampled, model.deconv_layers[3:6])
        self.phases = nn.ModuleList(
            nn.Sequential(*_phase(upsampling, upsampling_norm, row, column), relu) for row in (0, 1) for column in (0, 1)
        )
        self.heatmaps = nn.Sequential(fuse_conv_bn_eval(pointwise, norm), relu, model.final_layer)

    def forward(self, crops: Tensor) -> Tensor:
        x = self.body(self.stem(self.first(crops)))
        phases = torch.cat([self.heatmaps(phase(x)) for phase in self.phases], dim=1)
        height, width, keypoints = x.shape[2], x.shape[3], phases.shape[1] // 4
        # Columns, then rows: to move one dimension at a time takes a fifth of the time.
        wide = phases.reshape(-1, 2, 2, keypoints, height, width).permute(0, 1, 3, 4, 5, 2).flatten(4)
        return wide.permute(0, 2, 3, 1, 4).reshape(-1, keypoints, 2 * height, 2 * width)


class _First(nn.Module):
    """The first convolution with the normalisation before it: crops [N, H, W, 3] → [N, 64, H/2, W/2]."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = copy.deepcopy(convolution)
        self.convolution.weight = nn.Parameter(convolution.weight / (torch.tensor(STD) * 255)[:, None, None])
        self.mean = nn.Buffer(torch.tensor(MEAN) * 255)

    def forward(self, crops: Tensor) -> Tensor:
        # Of whole rows: with the three channels as its innermost dimension the difference takes 15 times as long.
        rows = crops.flatten(2).float() - self.mean.repeat(crops.shape[2])
        found: Tensor = self.convolution(rows.reshape(-1, *crops.shape[1:]).permute(0, 3, 1, 2))
        return found


class _FirstOnBlocks(nn.Module):
    """The same, 7×7 in steps of two on 3 channels, as 4×4 in single steps on the 12 channels (row, column, colour) of blocks
    of 2×2 pixels: in int8 equal to the bit, and quicker."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight / (torch.tensor(STD) * 255)[:, None, None]
        whole = functional.pad(weight, (1, 0, 1, 0))  # [64, 3, 8, 8], whose first row and column count nothing
        by_block = whole.reshape(-1, 3, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4)
        self.convolution = nn.Conv2d(12, len(weight), 4, bias=False)
        self.convolution.weight = nn.Parameter(by_block.reshape(-1, 12, 4, 4))
        self.mean = nn.Buffer(torch.tensor(MEAN) * 255)

    def forward(self, crops: Tensor) -> Tensor:
        height, width = crops.shape[1] // 2, crops.shape[2] // 2
        blocks = crops.reshape(-1, height, 2, width, 6).transpose(2, 3)
        rows = blocks.reshape(-1, height, width * 12).float() - self.mean.repeat(width * 4)
        padded = functional.pad(rows.reshape(-1, height, width, 12).permute(0, 3, 1, 2), (2, 1, 2, 1))
        found: Tensor = self.convolution(padded)
        return found


class _Upsampling(nn.Module):
    """An upsampling [N, C, H, W] → [N, O, 2H, 2W] with its normalisation and ReLU, as one 3×3 convolution that gives its four
    phases. It has few groups, with weights that are mostly 0: ONNX Runtime computes transposed convolutions in float32 alone.
    """

    def __init__(self, upsampling: GroupedUpsampling, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        inputs, outputs = upsampling.in_channels // _GROUPS, upsampling.out_channels // _GROUPS  # of a group
        share = upsampling.in_channels // upsampling.out_channels  # that make one output
        weight = torch.zeros(_GROUPS, 2, 2, outputs, inputs, 3, 3)
        bias = torch.zeros(_GROUPS, 2, 2, outputs)
        for row in (0, 1):
            for column in (0, 1):
                phase = cast("nn.Conv2d", _phase(upsampling, norm, row, column)[1])
                kernels = phase.weight.detach().reshape(_GROUPS, outputs, share, 2, 2)
                for output in range(outputs):
                    given = slice(output * share, (output + 1) * share)
                    weight[:, row, column, output, given, row : row + 2, column : column + 2] = kernels[:, output]
                bias[:, row, column] = cast("Tensor", phase.bias).detach().reshape(_GROUPS, outputs)
        self.convolution = nn.Conv2d(upsampling.in_channels, 4 * upsampling.out_channels, 3, padding=1, groups=_GROUPS)
        self.convolution.weight = nn.Parameter(weight.reshape(-1, inputs, 3, 3))
        self.convolution.bias = nn.Parameter(bias.flatten())
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        phases = (
            functional.relu(self.convolution(x)).permute(0, 2, 3, 1).reshape(-1, height, width, _GROUPS, 2, 2, self.outputs)
        )
        return (
            phases.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 2 * height, 2 * width, _GROUPS * self.outputs).permute(0, 3, 1, 2)
        )


def _phase(upsampling: GroupedUpsampling, norm: nn.BatchNorm2d, row: int, column: int) -> tuple[nn.Module, nn.Module]:
    """Padding and convolution that give every second row and column, from (row, column) on, of a normalised upsampling."""
    channels, groups = upsampling.out_channels, upsampling.groups
    convolution = nn.Conv2d(upsampling.in_channels, channels, 2, groups=groups, bias=False).eval()
    kernel = upsampling.weight[:, :, _KERNEL_ROWS[row]][..., _KERNEL_ROWS[column]]
    convolution.weight = nn.Parameter(kernel.reshape(channels, -1, 2, 2))
    return nn.ZeroPad2d((1 - column, column, 1 - row, row)), fuse_conv_bn_eval(convolution, norm)
