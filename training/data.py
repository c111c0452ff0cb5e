"""Labelled people: COCO keypoint files with their pictures, and a cache of crops on disk that training draws from.

A set is `<name>.json` (COCO keypoints) beside its pictures: in zip files named by each image's `zip`, or in a folder. An
annotation may have `keypoint_weights` [17], the trust in each joint, 0…1.
"""

import contextlib
import io
import json
import logging
import math
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from app.inference.session import usable_cores
from app.vision import box
from app.vision.image import FLAGS
from training.cache import Pictures, cached
from training.files import DataError
from training.keypoints import NAMES

log = logging.getLogger(__name__)

ASPECT = 192 / 256
KEYPOINTS = len(NAMES)
_FARTHEST = 1_000_000  # pixels, of a box
_AREA = 0.52  # of a box, where people have no area: the median share of COCO's masks
_ORIENTATION = 0x0112  # EXIF's tag
_REGION = 1.4  # the cached part of the picture, as a multiple of the padded box: room for shift, scale and rotation


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a set: its file's bytes, and the image and annotations of the JSON file."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    data: bytes

    def pixels(self, reduction: int = 1) -> npt.NDArray[np.uint8]:
        """The pixels [H, W, 3] (BGR), each side `reduction` times smaller. EXIF orientation is ignored, as COCO's labels do.
        Raises DataError.

        A picture of another size than the JSON file says was labelled in other pixels, those of the turned picture perhaps.
        """
        flags = FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(self.data, np.uint8), flags) if self.data else None
        except cv2.error:  # a header of very many pixels
            pixels = None
        if pixels is None:
            raise DataError(f"{self.image['file_name']} is not a picture that OpenCV reads")
        height, width = pixels.shape[:2]
        labelled = (self.image["width"], self.image["height"])
        if (width, height) != tuple(-(-side // reduction) for side in labelled):
            raise DataError(
                f"{self.image['file_name']} has {width * reduction} × {height * reduction} pixels before any turn by EXIF; "
                f"its labels are for {labelled[0]} × {labelled[1]}. Where they are of upright pictures, save these turned, "
                "without EXIF"
            )
        return np.asarray(pixels, np.uint8)


def read_annotations(annotation_file: Path) -> dict[str, Any]:
    """The content of a COCO keypoint file: its people, with category 1 and `num_keypoints`. Raises DataError."""
    with _faults_of(annotation_file):
        return _people_of(_content_of(annotation_file))


def person_category_of(annotation_file: Path) -> Any:
    """The id by which a COCO keypoint file, and detections of its pictures, mark people. Raises DataError."""
    with _faults_of(annotation_file):
        return _person_category(_content_of(annotation_file))


def _content_of(annotation_file: Path) -> dict[str, Any]:
    content = json.loads(annotation_file.read_bytes())
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise DataError(f"{annotation_file} is not a COCO file: it has no images or no annotations")
    return content


@contextlib.contextmanager
def _faults_of(annotation_file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{annotation_file} cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{annotation_file} is not JSON: {error}") from error
    except KeyError as error:
        raise DataError(f"{annotation_file}: an image or annotation has no {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{annotation_file}: {error}") from error


def _people_of(content: dict[str, Any]) -> dict[str, Any]:
    """A COCO file's content with the annotations of people alone, checked. Raises KeyError, ValueError and TypeError."""
    for image in content["images"]:
        _check_image(image)
    known = _ids(content, "images")
    _ids(content, "annotations")
    person = _person_category(content)
    people = []
    without_area = 0
    for annotation in content["annotations"]:
        if annotation.get("category_id", person) != person:
            continue
        if annotation["image_id"] not in known:
            raise ValueError(f"annotation {annotation['id']} is of an image that there is not")
        _check_person(annotation)
        keypoints = annotation.get("keypoints") or []
        width, height = annotation["bbox"][2:]
        labelled = {"num_keypoints": sum(seen > 0 for seen in keypoints[2::3])}
        without_area += "area" not in annotation and labelled["num_keypoints"] > 0
        area = {"area": _AREA * width * height}
        people.append({**labelled, **area, **annotation, **(labelled if keypoints else {}), "category_id": 1})
    if content["annotations"] and not people:
        there = ", ".join(map(repr, {annotation.get("category_id") for annotation in content["annotations"]}))
        raise ValueError(f"no annotation is of its category person, {person!r}; they are of {there}")
    if without_area:
        log.warning(
            "%d people have no area: %s of their box is taken, as COCO's masks have in the median", without_area, _AREA
        )
    return {**content, "annotations": people, "categories": [{"id": 1, "name": "person"}]}


def _person_category(content: dict[str, Any]) -> Any:
    """The id of a COCO file's category "person"; 1 where it names no categories. Raises ValueError where people are none of
    them, or have other keypoints than COCO's, and KeyError.
    """
    categories = content.get("categories") or [{"id": 1, "name": "person"}]
    people = [each for each in categories if each.get("name") == "person"]
    person = next((each for each in people if each.get("keypoints")), people[0] if people else None)
    if person is None:
        names = ", ".join(str(each.get("name")) for each in categories)
        raise ValueError(f"none of its categories is called person: {names}")
    joints = person.get("keypoints") or NAMES
    if tuple(joints) != NAMES:
        raise ValueError(f"its people's keypoints are not COCO's 17 in COCO's order: {', '.join(map(str, joints))}")
    return person["id"]


def _ids(content: dict[str, Any], key: str) -> set[Any]:
    """The ids of the images or annotations. Raises ValueError where two have one, as in files put together as they are."""
    ids: set[Any] = set()
    for each in content[key]:
        if each["id"] in ids:
            raise ValueError(f"two {key} have the id {each['id']}")
        ids.add(each["id"])
    return ids


def _check_image(image: dict[str, Any]) -> None:
    """Raise ValueError unless an image has a file's name and a size, and KeyError where it lacks one."""
    named = isinstance(image["file_name"], str) and isinstance(image.get("zip", ""), str | None)
    if not named or not all(isinstance(image[side], int | float) and image[side] > 0 for side in ("width", "height")):
        raise ValueError(f"image {image['id']} has no file_name, or no width and height in pixels")


def _check_person(annotation: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for what is no person's annotation, and KeyError where it lacks something."""
    number, keypoints = annotation["id"], annotation.get("keypoints") or []
    if not isinstance(number, int):
        raise TypeError(f"annotation {number!r} has an id that is no whole number")
    _check_numbers(annotation, "bbox", 4)
    if any(abs(value) > _FARTHEST for value in annotation["bbox"]):
        raise ValueError(f"annotation {number} has a bbox that reaches beyond {_FARTHEST:,} pixels")
    for key in ("area", "num_keypoints"):
        value = annotation.get(key, 0)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"annotation {number} has {key} {value!r}, which is no number of 0 or more")
    if keypoints or annotation.get("num_keypoints", 0):
        _check_numbers(annotation, "keypoints", 3 * KEYPOINTS)
        if any(abs(value) > _FARTHEST for value in keypoints):
            raise ValueError(f"annotation {number} has keypoints beyond {_FARTHEST:,} pixels")
    if annotation.get("iscrowd", 0) not in (0, 1) or isinstance(annotation.get("iscrowd"), str):
        raise ValueError(f"annotation {number} has iscrowd {annotation['iscrowd']!r}, which is neither 0 nor 1")
    if any(seen > 0 for seen in keypoints[2::3]) and not annotation.get("area", 1):
        raise ValueError(f"annotation {number} has keypoints and no area over 0, by which COCO measures them")
    _check_trust(annotation)


def _check_trust(annotation: dict[str, Any]) -> None:
    number = annotation["id"]
    if "keypoint_weights" in annotation:
        _check_numbers(annotation, "keypoint_weights", KEYPOINTS)
        if not all(0 <= trust <= 1 for trust in annotation["keypoint_weights"]):
            raise ValueError(f"annotation {number} has keypoint_weights that are not between 0 and 1")


def _check_numbers(annotation: dict[str, Any], key: str, count: int) -> None:
    """Raise ValueError unless the annotation has so many numbers under the key, and KeyError where it has none."""
    values = annotation[key]
    numbers = isinstance(values, list) and all(isinstance(each, int | float) and math.isfinite(each) for each in values)
    if not numbers or len(values) != count:
        raise ValueError(f"annotation {annotation['id']} has a {key} that is not {count} numbers")


def set_of(content: dict[str, Any], people: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO file's content with these annotations alone, and the pictures that they are of."""
    shown = {person["image_id"] for person in people}
    return {**content, "images": [image for image in content["images"] if image["id"] in shown], "annotations": people}


def read_pictures(annotation_file: Path, image_folder: Path | None = None) -> Iterator[Picture]:
    """The pictures of a COCO file in its order, from `image_folder` or from beside it. Raises DataError."""
    content = read_annotations(annotation_file)
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    archives: dict[str, zipfile.ZipFile] = {}
    turned = False
    for image in content["images"]:
        name = image.get("zip")
        folder = image_folder or annotation_file.parent
        try:
            if name is None or image_folder is not None:
                data = (folder / image["file_name"]).read_bytes()
            else:
                if name not in archives:
                    archives[name] = zipfile.ZipFile(folder / name)
                data = archives[name].read(image["file_name"])
        except (OSError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # encrypted, or a NUL
            raise DataError(f"{image['file_name']} of {folder / (name or '')} cannot be read: {error}") from error
        if not turned and _is_turned(data):
            turned = True
            log.warning(
                "%s is stored turned (EXIF). Labels are taken for those of the stored pixels, as COCO's are; where yours are "
                "of upright pictures, save the pictures turned, without EXIF",
                image["file_name"],
            )
        yield Picture(image, by_image[image["id"]], data)


def _is_turned(data: bytes) -> bool:
    with contextlib.suppress(Exception):  # what is no picture is told where its pixels are needed
        return PIL.Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION) in range(2, 9)
    return False


@dataclass(frozen=True, slots=True)
class People(Pictures):
    """Crops of people with keypoints.

    `centres` [N, 2] and `sizes` [N, 2] are the padded boxes and `keypoints` [N, 17, 2] the joints, in the crops' pixels;
    `weights` [N, 17] is 0 for unlabelled joints.
    """

    centres: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.float32]
    keypoints: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]


def cached_people(annotation_file: Path, cache: Path, height: int) -> People:
    """The labelled people of a set, cropped for networks of input `height`; made on the first call, then mapped from disk.

    Raises DataError.
    """
    name = f"{annotation_file.parent.name}-{annotation_file.stem}-{height}"
    return People(**cached(cache, name, annotation_file, lambda out: _write_people(annotation_file, height, out)))


def gathered(cut_outs: list[tuple[npt.NDArray[np.uint8], dict[str, Any]]]) -> People:
    """People as `cut_out` makes them, in memory."""
    columns = {key: np.asarray([row[key] for _, row in cut_outs]) for key in cut_outs[0][1]}
    pixels = [each.reshape(-1) for each, _ in cut_outs]
    return People(pixels=np.concatenate(pixels), offsets=np.cumsum([0, *map(len, pixels)]), **columns)


def _write_people(annotation_file: Path, height: int, out: BinaryIO) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {key: [] for key in ("heights", "widths", "centres", "sizes", "keypoints", "weights")}
    offsets = [0]

    def cut_outs(picture: Picture) -> list[tuple[npt.NDArray[np.uint8], dict[str, Any]]]:
        labelled = [
            a for a in picture.annotations if a["num_keypoints"] > 0 and not a.get("iscrowd", 0) and min(a["bbox"][2:]) > 0
        ]
        whole = picture.pixels() if labelled else np.zeros((0, 0, 3), np.uint8)
        return [cut_out(whole, annotation, height) for annotation in labelled]

    threads = usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        for people in in_order(pool, cut_outs, read_pictures(annotation_file), 2 * threads):
            for pixels, row in people:
                out.write(pixels.tobytes())
                offsets.append(offsets[-1] + pixels.size)
                for key, value in row.items():
                    columns[key].append(value)
    if len(offsets) == 1:
        raise DataError(f"{annotation_file} holds nobody with keypoints")
    log.info("%s at %d: %d people, %.1f GB of crops", annotation_file.stem, height, len(offsets) - 1, offsets[-1] / 1e9)
    return {"offsets": np.asarray(offsets)} | {key: np.asarray(values) for key, values in columns.items()}


def in_order(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """As pool.map, but at most `ahead` items are taken before their turn, where pool.map would take all at once."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def cut_out(
    picture: npt.NDArray[np.uint8], annotation: dict[str, Any], height: int
) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    """One person's surroundings, reduced to what a network of input `height` can use, and the labels in its pixels."""
    centres, sizes = box.centres_and_sizes(np.array([annotation["bbox"]]), ASPECT)
    centre, size = centres[0].astype(np.float64), sizes[0].astype(np.float64)
    limit = np.array(picture.shape[1::-1])
    low = np.clip(np.floor(centre - size * _REGION / 2), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(centre + size * _REGION / 2), low + 1, limit).astype(int)
    pixels = picture[low[1] : high[1], low[0] : high[0]]
    factor = np.ones(2)
    if size[1] > height:
        shape = np.maximum(1, np.rint((high - low) * (height / size[1]))).astype(int)
        factor = shape / (high - low)
        # Half of the people are reduced without anti-aliasing, as the service's bilinear crops are.
        smooth = annotation["id"] % 2 == 0
        pixels = np.asarray(
            cv2.resize(pixels, tuple(shape.tolist()), interpolation=cv2.INTER_AREA if smooth else cv2.INTER_LINEAR),
            np.uint8,
        )
    joints = np.asarray(annotation["keypoints"], np.float64).reshape(-1, 3)
    trust = np.asarray(annotation.get("keypoint_weights", np.ones(len(joints))), np.float64)
    row = {
        "heights": pixels.shape[0],
        "widths": pixels.shape[1],
        "centres": ((centre - low + 0.5) * factor - 0.5).astype(np.float32),
        "sizes": (size * factor).astype(np.float32),
        "keypoints": ((joints[:, :2] - low + 0.5) * factor - 0.5).astype(np.float32),
        "weights": (trust * (joints[:, 2] > 0)).astype(np.float32),
    }
    return pixels, row
