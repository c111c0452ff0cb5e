"""Which cells answer for which person, and what their answers cost.

RTMDet's assignment by dynamic soft labels (arXiv 2212.07784, section 3.3); varifocal loss (arXiv 2008.13367), whose target is
the box's IoU so that scores rank boxes by their fit, and which heeds people more than background; GIoU (arXiv 1902.09630).
"""

import torch
from torch import Tensor
from torch.nn import functional

_CANDIDATES = 13  # the best so many IoUs with a person add up to the number of its cells
_IOU_COST = 3.0
_CENTRE_RADIUS = 3.0  # in strides, beyond which a cell's cost grows tenfold with each stride
_BOX_WEIGHT = 2.0
_BACKGROUND_WEIGHT = 0.75
_FAR = 1e6


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Boxes [A, 4] and others [G, 4] (x1, y1, x2, y2) → IoU [A, G]."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp(min=1e-6)


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU [P] of pairs of boxes [P, 4]: 1 where equal, down to -1 where far apart."""
    shared = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others)]
    union = (areas[0] + areas[1] - shared).clamp(min=1e-6)
    hull = (torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])).prod(1).clamp(min=1e-6)
    return shared / union - (hull - union) / hull


def inside(centres: Tensor, boxes: Tensor) -> Tensor:
    """Which centres [A, 2] lie in which boxes [G, 4]: [A, G]."""
    return ((centres[:, None] > boxes[None, :, :2]) & (centres[:, None] < boxes[None, :, 2:])).all(2)


@torch.no_grad()
def assign(logits: Tensor, boxes: Tensor, people: Tensor, centres: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """One picture's logits [A] and boxes [A, 4], and its people [G, 4] → for each cell its person or -1, and its IoU with it.

    A person gets as many cells as the predictions deserve, and one at least if the box holds a cell's centre; a cell that two
    people want goes to the cheaper one.
    """
    nobody = torch.full_like(logits, -1, dtype=torch.long), torch.zeros_like(logits)
    if len(people) == 0:
        return nobody
    within = inside(centres, people)
    candidates = within.any(1).nonzero()[:, 0]
    if len(candidates) == 0:
        return nobody
    iou = pairwise_iou(boxes[candidates], people)
    scores = logits[candidates, None].sigmoid()
    wanted = functional.binary_cross_entropy_with_logits(logits[candidates, None].expand_as(iou), iou, reduction="none")
    away = torch.cdist(centres[candidates], (people[:, :2] + people[:, 2:]) / 2) / strides[candidates, None]
    cost = wanted * (iou - scores).abs() ** 2 - _IOU_COST * (iou + 1e-7).log() + 10 ** (away - _CENTRE_RADIUS)
    cost = cost + _FAR * ~within[candidates]
    counts = iou.topk(min(_CANDIDATES, len(candidates)), dim=0).values.sum(0).int().clamp(min=1)
    ranks = cost.argsort(0).argsort(0)
    chosen = (ranks < counts) & (cost < _FAR)
    price, person = cost.masked_fill(~chosen, float("inf")).min(1)
    taken = price.isfinite()
    nobody[0][candidates[taken]] = person[taken]
    nobody[1][candidates[taken]] = iou[taken, person[taken]]
    return nobody


def detection_loss(
    logits: Tensor, boxes: Tensor, people: list[Tensor], ignored: list[Tensor], centres: Tensor, strides: Tensor
) -> dict[str, Tensor]:
    """The losses of a batch: logits [N, A] and boxes [N, A, 4], each picture's people [G, 4] and ignored areas [I, 4].

    `score` and `box` are averaged by the summed quality of all cells that answer for somebody. Cells in an ignored area that
    answer for nobody cost nothing.
    """
    target = torch.zeros_like(logits)
    weight = torch.ones_like(logits)
    found, true, quality = [], [], []
    for number, (here, spared) in enumerate(zip(people, ignored, strict=True)):
        person, iou = assign(logits[number], boxes[number], here, centres, strides)
        answering = person >= 0
        target[number] = iou
        if len(spared):
            weight[number] = (answering | ~inside(centres, spared).any(1)).to(weight.dtype)
        found.append(boxes[number][answering])
        true.append(here[person[answering]])
        quality.append(iou[answering])
    total = target.sum().clamp(min=1)
    importance = torch.where(target > 0, target, _BACKGROUND_WEIGHT * logits.detach().sigmoid() ** 2)
    score = functional.binary_cross_entropy_with_logits(logits, target, weight * importance, reduction="sum") / total
    misfit = ((1 - giou(torch.cat(found), torch.cat(true))) * torch.cat(quality)).sum() / total
    return {"score": score, "box": _BOX_WEIGHT * misfit}
