"""What finds the keypoints that are measured: a stored model, decoded in one way or several, or a running service."""

from collections.abc import Callable, Sequence

import cv2
import httpx
import numpy as np
import numpy.typing as npt

from app.inference.pose import Crops, PoseModel
from app.vision import image
from training.data import Picture
from training.decoders import Decoder
from training.files import DataError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# A picture and boxes [N, 4] → for each way of finding them, keypoints [N, 17, 3].
Estimator = Callable[[Picture, Float64], dict[str, Float64]]

PLAIN, FLIPPED = "", ", flip test"  # ends of the names of ways, and of the rows of tables
_BATCH = 8


def decoder_of(model: PoseModel) -> Decoder:
    """The decoder that the service uses for the model."""
    shape = model.description.heatmap
    return Decoder(shape.beta, shape.quarter_shift, shape.window, shape.mirror_shift)


def cut(model: PoseModel, picture: Picture, boxes: Float64) -> Crops:
    """The crops of people at boxes [N, 4], from as few pixels as the service decodes for them. Raises DataError."""
    try:
        header = image.read_header(picture.data)
        reductions = [image.crop_reduction(header, most) for most in model.most_reductions(boxes)]
    except image.InvalidImage:
        reductions = [1] * len(boxes)  # a format that OpenCV may read all the same
    return model.cut_each(picture.pixels, boxes, reductions)


def local_estimator(model: PoseModel, decoders: Sequence[Decoder], flip_tests: Sequence[bool]) -> Estimator:
    """The model itself: one run of the network on the crops, and one on the mirrored ones, for all ways of decoding.

    A single decoder's ways are called PLAIN and FLIPPED, those of several start with the decoder's name.
    """

    def estimate(picture: Picture, boxes: Float64) -> dict[str, Float64]:
        crops = cut(model, picture, boxes)
        found: dict[str, list[Float32]] = {}
        for start in range(0, len(boxes), _BATCH):
            pixels = crops.pixels[start : start + _BATCH]
            heatmaps = model.heatmaps(pixels)
            for flip_test in flip_tests:
                maps = heatmaps
                if flip_test:
                    maps = model.averaged(heatmaps, model.heatmaps(np.ascontiguousarray(pixels[:, :, ::-1])))
                for decoder in decoders:
                    way = (decoder.name if len(decoders) > 1 else "") + (FLIPPED if flip_test else PLAIN)
                    found.setdefault(way, []).append(decoder(maps))
        return {way: model.to_picture(np.concatenate(batches), crops) for way, batches in found.items()}

    return estimate


def _file_as_labelled(picture: Picture) -> bytes:
    """The picture's file, or where a service would turn it by EXIF the stored pixels as a PNG: the labels are in those."""
    stored = picture.pixels()
    upright = np.asarray(cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR))
    return picture.data if np.array_equal(stored, upright) else cv2.imencode(".png", stored)[1].tobytes()


def server_estimator(client: httpx.Client, model: str, flip_tests: Sequence[bool]) -> Estimator:
    """A running service, through HTTP and its JSON."""

    def ask(picture: Picture, file: bytes, boxes: Float64, flip_test: bool) -> Float64:
        options: dict[str, str | int] = {"format": "results", "model": model, "flip_test": flip_test, "timeout_ms": 60_000}
        written = ";".join(",".join(map(repr, map(float, place))) for place in boxes)
        answer = client.post(
            "/v1/pose",
            params={"boxes": written, **options},
            content=file,
            headers={"Content-Type": "application/octet-stream"},
        )
        if answer.is_error:
            raise DataError(f"{picture.image['file_name']}: the service answered {answer.status_code}: {answer.text}")
        return np.array([person["keypoints"] for person in answer.json()]).reshape(len(boxes), 17, 3)

    def estimate(picture: Picture, boxes: Float64) -> dict[str, Float64]:
        file = _file_as_labelled(picture)
        return {FLIPPED if flip_test else PLAIN: ask(picture, file, boxes, flip_test) for flip_test in flip_tests}

    return estimate
