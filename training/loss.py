"""What is made small: the distance between heatmaps and their targets, from labels or from a teacher."""

import torch
from torch import Tensor

_SHARPNESS = 12.0  # of the softmax in the placement loss; heatmaps peak at 1


def target_heatmaps(keypoints: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Keypoints [N, K, 2] in cells → Gaussians [N, K, H, W] of height 1 at their exact places."""
    rows, columns = (torch.arange(length, device=keypoints.device) for length in (height, width))
    x, y = keypoints[..., :1], keypoints[..., 1:]
    across = torch.exp(-((columns - x) ** 2) / (2 * sigma**2))
    down = torch.exp(-((rows - y) ** 2) / (2 * sigma**2))
    return down.unsqueeze(3) * across.unsqueeze(2)


def heatmap_loss(heatmaps: Tensor, targets: Tensor, weights: Tensor, placement: float, hardest: int = 17) -> Tensor:
    """Squared error plus cross-entropy between softmaxes over the map, averaged by the joints' weights [N, K].

    Both are least at the target. The squared error alone spends its first epochs on learning that most cells are 0; the
    cross-entropy asks at once where the joint is. Of each person only the `hardest` joints count, those furthest from it.
    A person counts by the root of the joints' number: OKS counts whoever has few labelled ones as much as anybody.
    """
    squared = ((heatmaps - targets) ** 2).sum((2, 3))
    wanted = (_SHARPNESS * targets).flatten(2).softmax(2)
    given = (_SHARPNESS * heatmaps).flatten(2).log_softmax(2)
    losses = (0.5 * squared - placement * (wanted * given).sum(2)) * weights
    if hardest < losses.shape[1]:
        least = -placement * (wanted * wanted.log()).sum(2) * weights  # which is left of a joint that is right
        joints = (losses.detach() - least).topk(hardest, dim=1).indices
        losses, weights = losses.gather(1, joints), weights.gather(1, joints)
    labelled = weights.sum(1, keepdim=True).clamp(min=1).sqrt()
    return (losses / labelled).sum() / (weights / labelled).sum().clamp(min=1)


def trust_in(heatmaps: Tensor) -> Tensor:
    """How far a teacher's heatmaps [N, K, H, W] are to be followed, [N, K]: their height, 0…1."""
    return heatmaps.amax((2, 3)).clamp(0, 1)
