"""The people of a picture by their keypoints: how sure each is, and who of them is somebody else twice."""

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

SCORE_DECIMALS = 4  # that answers tell
SURE = 0.2  # joints scored at or below it tell nothing of where somebody is (the reference's IN_VIS_THRE)
_SAME_PLACE = 0.075  # of a person's size; see same_people


def visible(keypoints: Float64, threshold: float) -> npt.NDArray[np.bool_]:
    """Which joints of keypoints [..., K, 3] (x, y, score) are called visible: by their scores as answers tell them."""
    return np.asarray(np.round(keypoints[..., 2], SCORE_DECIMALS) >= threshold)


def person_scores(keypoints: Float64, box_scores: Float64) -> Float64:
    """Scores [N] of people: the mean over keypoints [N, K, 3] scored above SURE, times the box's (lib/dataset/coco.py)."""
    scores = keypoints[..., 2]
    counted = scores > SURE
    mean = (scores * counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    return np.asarray(mean * box_scores)


def distinct_people(keypoints: Float64, scores: Float64, boxes: Float64) -> npt.NDArray[np.bool_]:
    """Which of the found people of a picture, [N, K, 3] with scores [N] and boxes [N, 4], are nobody of a higher score."""
    same = same_people(keypoints, boxes)
    distinct = np.zeros(len(scores), np.bool_)
    for person in np.argsort(-scores, kind="stable"):
        distinct[person] = not (same[person] & distinct).any()
    return distinct


def same_people(keypoints: Float64, boxes: Float64) -> npt.NDArray[np.bool_]:
    """Whether each of the found people, [N, K, 3] with boxes [N, 4], is each of them: [N, N].

    Somebody is often found twice, whole and in part. It is the same person where at least half of the joints above SURE
    lie where the other has them, to 7.5 % of the size (the root of the area) of the smaller box.
    """
    sure = keypoints[..., 2] > SURE
    sizes = np.sqrt(boxes[:, 2:].prod(axis=1))
    x, y = keypoints[..., 0], keypoints[..., 1]
    near = np.hypot(x[:, None] - x, y[:, None] - y) < _SAME_PLACE * np.minimum(sizes[:, None], sizes)[..., None]
    shared, least = (near & sure[:, None]).sum(axis=2), np.maximum(sure.sum(axis=1) / 2, 1)
    return np.asarray(shared >= least[:, None])
