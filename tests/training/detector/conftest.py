"""Drawn photos in the documented form: people are red rectangles on grey noise."""

import json
import zipfile

import cv2
import numpy as np
import pytest


def drawn_photo(rng, boxes, shape=(120, 160)):
    photo = rng.integers(90, 140, (*shape, 3), np.uint8)
    for x, y, width, height in boxes:
        photo[y : y + height, x : x + width] = (20, 20, 230)
    return photo


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three sets: train/drawn (four photos), train/nobody (two) and dev/coco (two)."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, name, count in (("train", "drawn", 4), ("train", "nobody", 2), ("dev", "coco", 2)):
        (folder / part).mkdir(exist_ok=True)
        images, annotations = [], []
        with zipfile.ZipFile(folder / part / f"{name}-0.zip", "w") as archive:
            for number in range(1, count + 1):
                boxes = [] if name == "nobody" else [[10 * number, 20, 30, 70], [90, 10, 40, 90]]
                archive.writestr(f"{number}.png", cv2.imencode(".png", drawn_photo(rng, boxes))[1].tobytes())
                images.append(
                    {"id": number, "file_name": f"{number}.png", "zip": f"{name}-0.zip", "width": 160, "height": 120}
                )
                for box in boxes:
                    annotations.append(
                        {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": box,
                         "area": box[2] * box[3], "iscrowd": 0, "num_keypoints": 17, "keypoints": [9, 9, 2] * 17}
                    )  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": []}
        (folder / part / f"{name}.json").write_text(json.dumps(content))
    return folder
