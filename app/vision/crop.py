"""Affine crops of people, cut into one preallocated batch."""

import cv2
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]


def cut_crops(picture: UInt8, affines: npt.NDArray[np.float64], out: UInt8) -> None:
    """Fill out [N, h, w, 3] with the areas of picture [H, W, 3] that affines [N, 2, 3] map onto crops.

    Bilinear, black outside the picture, as the reference crops (lib/dataset/JointsDataset.py).
    """
    height, width = out.shape[1:3]
    for affine, crop in zip(affines, out, strict=True):
        cv2.warpAffine(picture, affine, (width, height), dst=crop, flags=cv2.INTER_LINEAR)
