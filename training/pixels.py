"""From crops to what the network takes."""

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, in RGB order on BGR pixels, as the reference feeds them
STD = (0.229, 0.224, 0.225)


def normalised(crops: Tensor) -> Tensor:
    """Crops [N, H, W, 3] BGR, 0…255 → network input [N, 3, H, W] float32, channels last."""
    mean, std = (torch.tensor(values, device=crops.device) * 255 for values in (MEAN, STD))
    return ((crops.float() - mean) / std).permute(0, 3, 1, 2)
