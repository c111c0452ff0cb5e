"""What is seen → COCO annotations: a joint is visible, hidden, or outside of the picture."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.synthetic.render import Drawn

_WORN = 0.03  # metres more that a joint of the body may lie under cloth
_FACE = 5  # the first joints are the face's
_TRUST = (0.0, 0.5)  # in hidden joints of the face and of the body, which people seldom label, and badly
_LEAST_PIXELS = 60  # of the picture; below, a person has a box but no keypoints
_LEAST_JOINTS = 3  # that are seen, as well


def annotations(drawn: Drawn, slack: npt.NDArray[np.float32], oversampled: int) -> list[list[dict[str, Any]]]:
    """For each image an annotation, without ids, of everybody of whom something is seen; places are in pixels of pictures.

    A joint is hidden (v = 1) where somebody else or a thing is before it, or where the person's own surface is nearer by more
    than `slack` [17], metres for a person of 1.7 m. Joints of the face are hidden by any hair or cloth.
    """
    boxes, areas = (values.cpu().numpy() for values in _silhouettes(drawn))
    visible = _visibility(drawn, slack).cpu().numpy()
    keypoints = ((drawn.keypoints[..., :2].double().cpu().numpy() + 0.5) / oversampled - 0.5).round(2)
    found: list[list[dict[str, Any]]] = [[] for _ in range(len(drawn.owner))]
    for person, image in enumerate(drawn.image.tolist()):
        if areas[person] == 0:
            continue
        v = visible[person]
        enough = areas[person] >= _LEAST_PIXELS * oversampled**2 and (v == 2).sum() >= _LEAST_JOINTS
        joints = [
            [*place, shown] if shown and enough else [0, 0, 0]
            for place, shown in zip(keypoints[person].tolist(), v.tolist(), strict=True)
        ]
        left, top, right, bottom = (boxes[person] / oversampled).tolist()
        found[image].append(
            {
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [left, top, right - left, bottom - top],
                "area": float(areas[person] / oversampled**2),
                "keypoints": [value for joint in joints for value in joint],
                "num_keypoints": sum(joint[2] > 0 for joint in joints),
                "keypoint_weights": [1.0 if v[joint] == 2 else _TRUST[joint >= _FACE] for joint in range(len(joints))],
                "iscrowd_unknown": not enough,  # a sliver of somebody is nothing that a detector should be sure of
                "labels": "rendered",
            }
        )
    return found


def _silhouettes(drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] (left, top, right, bottom) and areas [N] of what is seen of people, in drawn pixels."""
    people = len(drawn.image)
    _, y, x = torch.nonzero(drawn.owner >= 0, as_tuple=True)
    who = drawn.owner[drawn.owner >= 0]

    def end(values: Tensor, which: str) -> Tensor:
        return torch.zeros(people, dtype=values.dtype, device=values.device).scatter_reduce(
            0, who, values, which, include_self=False
        )

    boxes = torch.stack([end(x, "amin"), end(y, "amin"), end(x, "amax") + 1, end(y, "amax") + 1], 1)
    return boxes, torch.bincount(who, minlength=people)


def _visibility(drawn: Drawn, slack: npt.NDArray[np.float32]) -> Tensor:
    """2 visible, 1 hidden, 0 outside: [N, 17]."""
    _, height, width = drawn.owner.shape
    x, y, depth = drawn.keypoints.unbind(2)
    column, row = x.round().long(), y.round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (depth > 0)
    place = (drawn.image[:, None], row.clamp(0, height - 1), column.clamp(0, width - 1))
    people = torch.arange(len(drawn.image), device=x.device)[:, None]
    under = depth - drawn.depth[place]
    skin = torch.tensor(slack, device=x.device) * drawn.heights[:, None] / 1.7
    cloth = torch.where(torch.arange(17, device=x.device) < _FACE, 0.0, skin + _WORN)
    allowed = torch.where(drawn.bare[place], skin, cloth)
    hidden = torch.where(drawn.owner[place] == people, under > allowed, under > 0)
    return torch.where(inside, 2 - hidden.long(), 0)
