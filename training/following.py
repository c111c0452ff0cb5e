"""What following costs: `python -m training.following --model lpn50 --annotations people.json`.

How accurate people are who are looked for where their joints were, frame after frame, from their labelled boxes on, which are
moved at random as if the people moved. And, over frames of single people with fresh noise, how much their joints tremble and,
where they move, how far the smoothed ones lag.
"""

import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from app.inference.pose import PoseModel
from app.inference.session import take_one_thread_each
from app.vision import tracking
from training.accuracy import table
from training.command import coco_model, measuring_parser, model_folder, one_line_faults, positive
from training.data import Picture, read_pictures
from training.estimators import PLAIN, Estimator, decoder_of, local_estimator
from training.evaluate import evaluate_set, labelled_boxes
from training.files import DataError

Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

_FOLLOWED = (0, 1, 2, 4, 8, 17)  # frames; about 18 come from one search to the next
_STEP = 0.05  # sizes, the deviation of how far somebody moves from frame to frame, each way
_FRAMES, _FIRST = 24, 8  # of a video, and the one from which on it is measured
_SECONDS = 1 / 20
_NOISE = 6.0  # grey levels
_QUALITY = 80  # of the frames' JPEG
_LEAST_HEIGHT = 150
_SURE = 0.4
_SPEEDS = (0.0, 0.25, 1.0, 3.0)  # sizes of the person a second


def followed(estimate: Estimator) -> Estimator:
    """An estimator whose ways are the keypoints after some numbers of frames in which people were followed."""

    def after_frames(picture: Picture, boxes: Float64) -> dict[str, Float64]:
        random = np.random.default_rng(_seed_of(picture.image["id"]))
        sizes = np.sqrt(boxes[:, 2:].prod(axis=1))[:, None]
        ways: dict[str, Float64] = {}
        margins = boxes
        for frame in range(_FOLLOWED[-1] + 1):
            keypoints = estimate(picture, boxes)[PLAIN]
            if not frame:
                margins = tracking.margins(boxes, keypoints)
            boxes = tracking.next_boxes(boxes, keypoints, margins, picture.image["width"], picture.image["height"])
            boxes = boxes + np.hstack([random.normal(0, _STEP, (len(boxes), 2)) * sizes, np.zeros((len(boxes), 2))])
            if frame in _FOLLOWED:
                ways[f"after {frame} frames"] = keypoints
        return ways

    return after_frames


def _seed_of(image: int | str) -> int:
    """COCO's ids themselves; what some other files have for ids is no seed."""
    return image if isinstance(image, int) and image >= 0 else zlib.crc32(str(image).encode())


def videos(model: PoseModel, annotations: Path, images: Path | None) -> Iterator[tuple[Float64, float]]:
    """Of every picture of one person: the sure joints [frames, K, 2] over frames of fresh noise, and the person's size."""
    random = np.random.default_rng(0)
    for picture in read_pictures(annotations, images):
        boxes = labelled_boxes(picture).places
        if len(boxes) != 1 or boxes[0, 3] < _LEAST_HEIGHT:
            continue
        pixels, size = picture.pixels(), float(np.sqrt(boxes[0, 2] * boxes[0, 3]))
        frames: list[Float64] = []
        margins = boxes
        for _ in range(_FRAMES):
            crops = model.cut(_noisy(pixels, random), boxes)
            keypoints = model.to_picture(model.plain.run(crops.pixels).values, crops)
            margins = tracking.margins(boxes, keypoints) if not frames else margins
            boxes = tracking.next_boxes(boxes, keypoints, margins, pixels.shape[1], pixels.shape[0])
            frames.append(keypoints[0])
        joints = np.array(frames)
        sure = (joints[..., 2] > _SURE).all(axis=0)
        if sure.any():
            yield joints[:, sure, :2], size


def _noisy(pixels: UInt8, random: np.random.Generator) -> UInt8:
    noisy = np.clip(pixels + random.normal(0, _NOISE, pixels.shape), 0, 255).astype(np.uint8)
    file = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
    return np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR), np.uint8)


def tremble_and_lag(joints: Float64, size: float, speed: float) -> tuple[float, float, float]:
    """Of joints [frames, K, 2] that move sideways besides: the deviation of their steps from frame to frame before and after
    smoothing, and how far the smoothed ones are behind, as shares of the person's size."""
    seen = joints + np.arange(len(joints))[:, None, None] * [speed * size * _SECONDS, 0]
    motion = tracking.at_rest(seen[0])
    smoothed = [motion.places]
    for places in seen[1:]:
        motion = tracking.smooth(motion, places, size, _SECONDS)
        smoothed.append(motion.places)
    before, after = seen[_FIRST:], np.array(smoothed)[_FIRST:]
    steps = [float(np.diff(places, axis=0).std(axis=0).mean() / size) for places in (before, after)]
    return steps[0], steps[1], float(np.abs((before - after)[..., 0].mean(axis=0)).mean() / size)


def main() -> None:
    """The command line."""
    parser = measuring_parser("python -m training.following", "Measure what following people in a video costs.", "lpn50")
    parser.add_argument("--annotations", type=Path, required=True, help="a COCO keypoint file")
    parser.add_argument("--images", type=Path, help="the folder of its pictures")
    parser.add_argument("--videos", type=positive, default=50, help="pictures of one person that videos are made of")
    parser.add_argument("--threads", type=positive, default=1, help="pictures that are worked on at a time")
    arguments = parser.parse_args()
    take_one_thread_each()
    with one_line_faults():
        model = coco_model(model_folder(arguments.store, arguments.model))
        estimate = followed(local_estimator(model, [decoder_of(model)], [False]))
        found = evaluate_set(arguments.annotations, arguments.images, labelled_boxes, estimate, arguments.threads)
        print(table({way: accuracy.figures for way, accuracy in found.items()}))
        seen = list(islice(videos(model, arguments.annotations, arguments.images), arguments.videos))
        if not seen:
            raise DataError(f"{arguments.annotations} holds no picture of one person who is {_LEAST_HEIGHT} pixels high")
    print("\n| sizes a second | tremble | smoothed | lag |\n| --- | --- | --- | --- |")
    for speed in _SPEEDS:
        tremble, smoothed, lag = np.mean([tremble_and_lag(*each, speed) for each in seen], axis=0)
        print(f"| {speed:g} | {tremble:.2%} | {smoothed:.2%} | {lag:.2%} |")


if __name__ == "__main__":
    main()
