"""What is seen → COCO annotations: a joint is visible, hidden, or outside of the picture."""

from typing import Any

import numpy as np
import numpy.typing as npt

from training.synthetic.render import Seen
from training.synthetic.scene import Scene

_WORN = 0.03  # metres more that a joint of the body may lie under the surface: clothes
_FACE = 5  # the first joints are the face's, over which nothing is worn
_LEAST_PIXELS = 60  # of a person, drawn, below which it has a box but no keypoints


def annotations(scene: Scene, seen: Seen, slack: npt.NDArray[np.float32], oversampled: int) -> list[dict[str, Any]]:
    """An annotation, without ids, for everybody of whom something is seen; places are in pixels of the picture.

    Visibility is the z-buffer's: a joint is hidden (v = 1) where the surface at its pixel is nearer by more than
    `slack` [17], metres for a person of 1.7 m.
    """
    height, width = seen.owner.shape
    projected = scene.camera.project(scene.keypoints).double().numpy()
    found = []
    for person, joints in enumerate(projected):
        rows, columns = np.nonzero(seen.owner == person)
        if not len(rows):
            continue
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        allowed = slack * float(scene.heights[person]) / 1.7 + np.where(np.arange(17) < _FACE, 0, _WORN)
        keypoints = []
        for joint, (x, y, depth) in enumerate(joints):
            column, row = round(x), round(y)
            if not (0 <= column < width and 0 <= row < height and depth > 0):
                keypoints += [0.0, 0.0, 0]
                continue
            hidden = depth - seen.depth[row, column] > allowed[joint]
            keypoints += [*(round((value + 0.5) / oversampled - 0.5, 2) for value in (x, y)), 1 if hidden else 2]
        labelled = sum(v > 0 for v in keypoints[2::3]) if len(rows) >= _LEAST_PIXELS * oversampled**2 else 0
        found.append(
            {
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [round(float(value) / oversampled, 2) for value in (left, top, right - left, bottom - top)],
                "area": len(rows) / oversampled**2,
                "keypoints": keypoints if labelled else [0] * 51,
                "num_keypoints": labelled,
                "labels": "rendered",
            }
        )
    return found
