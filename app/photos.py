"""`lpn predict`: many photos → one COCO file, by any service that a client reaches.

While it runs, each photo's answer is a line of OUT.part, so that a run that was interrupted goes on where it stopped.
"""

import asyncio
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import orjson

from app.api.formats import result_of
from app.client import AsyncPoseClient, NoAnswer, Options, Pose, PoseError, Refused
from app.outputs import Part, check_regular, real, whole_file
from app.vision import drawing, image

_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"))
_UNREAD = frozenset((".heic", ".heif", ".avif", ".gif"))  # photos all the same: that they are left out must be told
_DRAWN = {".jpg": ".jpg", ".jpeg": ".jpg", ".png": ".png"}
# Problems of one photo; others would meet all of them.
_OF_A_PHOTO = frozenset(
    (
        "body_too_large",
        "image_too_large",
        "internal_error",
        "invalid_box",
        "invalid_image",
        "request_timeout",
        "too_many_boxes",
    )
)
_LATE = (502, 504)  # of a service or proxy that has too much to do
_PASSING = (*_LATE, 408, 500)  # a photo that came too slowly, or met a defect, may be answered the next time
_LATE_WAITS = (1, 5, 15, 30)  # seconds before a photo is asked for again that was late


class PhotoFault(Exception):
    """One photo has no answer; the others have. `passing`: it may have one the next time."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo to look at: its file, what it is called, its id, and its people's boxes if they are known, with the width and
    height of the picture that they lie in if those are told."""

    file: Path
    name: str
    id: int
    boxes: list[list[float]] | None = None
    size: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with which photos; `run` is what makes its answers differ from those of another run, and `out` None is
    standard output."""

    photos: Sequence[Photo]
    options: Options
    run: dict[str, str | None]
    out: Path | None
    form: str  # coco or results
    draw: Path | None
    max_bytes: int  # of a photo
    max_pixels: int  # of a photo that is drawn on


def photos_of(paths: Sequence[Path], boxes: Path | None) -> list[Photo]:
    """The photos that files and folders name, in that order; `boxes` is a COCO data set with their boxes and ids."""
    files: dict[str, Path] = {}
    for path in paths:
        for file, name in _files_of(path):
            if files.setdefault(name, file) != file:
                raise click.UsageError(f"{files[name]} and {file} are both called {name}; name the folder that holds both.")
    if boxes is None:
        return [Photo(file, name, number) for number, (name, file) in enumerate(files.items())]
    known = _known_boxes(boxes)
    strangers = [name for name in files if name not in known]
    if strangers:
        raise click.UsageError(f"{boxes} has no image called {strangers[0]}; {len(strangers)} of {len(files)} are missing.")
    return [Photo(file, name, *known[name]) for name, file in files.items()]


def _files_of(path: Path) -> list[tuple[Path, str]]:
    if not path.is_dir():
        return [(path, path.name)]

    def stop(error: OSError) -> None:
        raise click.UsageError(f"{error.filename}: {error.strerror}.")

    files = [Path(folder) / name for folder, _, names in os.walk(path, onerror=stop) for name in names]
    files = sorted(file for file in files if file.suffix.lower() in _SUFFIXES | _UNREAD)
    if not files:
        raise click.UsageError(f"{path} holds no photos ({', '.join(sorted(_SUFFIXES))}).")
    return [(file, file.relative_to(path).as_posix()) for file in files]


def _known_boxes(file: Path) -> dict[str, tuple[int, list[list[float]], tuple[float, float] | None]]:
    """File name → id, boxes and size of each image of a COCO data set; no boxes of crowds and of other things than people."""
    try:
        data = orjson.loads(file.read_bytes())
        names = {each["id"]: each["file_name"] for each in data["images"]}
        sizes = {each["id"]: (each["width"], each["height"]) for each in data["images"] if {"width", "height"} <= each.keys()}
        people = {each["id"] for each in data.get("categories", ()) if each["name"] == "person"}
        boxes: dict[int, list[list[float]]] = {id_: [] for id_ in names}
        for number, each in enumerate(data["annotations"]):
            if each.get("iscrowd", 0) or (people and each["category_id"] not in people):
                continue
            box = each["bbox"]
            if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
                raise click.UsageError(f"{file}: annotations.{number}.bbox is {box}; a box is x, y, width, height.")
            boxes[each["image_id"]].append(box)
        known = {name: (id_, boxes[id_], sizes.get(id_)) for id_, name in names.items()}
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        wish = "a COCO data set: images with id and file_name, annotations with image_id and bbox"
        raise click.UsageError(f"{file} is not {wish} ({type(error).__name__}: {error}).") from error
    if len(known) < len(data["images"]):
        raise click.UsageError(f"{file}: two of its images have the same id or file_name.")
    return known


def check_outputs(task: Task, read: Sequence[Path]) -> None:
    """Raise UsageError where what is written would take the place of what is read, the photos and `read`, or of what is also
    written."""
    inputs = {real(file) for file in (*(photo.file for photo in task.photos), *read)}
    if task.out is not None:
        if {real(task.out), real(_part_of(task.out))} & inputs:
            raise click.UsageError(f"--out {task.out} is one of the files that are read.")
        check_regular(task.out)
    if task.draw is not None:
        if any(folder in (real(task.draw), *real(task.draw).parents) for folder in inputs):
            raise click.UsageError(f"--draw {task.draw} lies in a folder that is read.")
        drawn = [real(_drawn_file(photo, task.draw)) for photo in task.photos]
        if len(set(drawn)) < len(drawn) or inputs & set(drawn):
            raise click.UsageError(f"--draw {task.draw}: drawn photos would take the place of others; name another folder.")


def _part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


async def asked_of(task: Task, client: AsyncPoseClient) -> Task:
    """The task as one of the models that the client's service has. Raises PoseError."""
    models = [f"{each['name']}/{each['version']} {each['sha256']} {each['default']}" for each in await client.models()]
    return replace(task, run=task.run | {"models": ", ".join(models)})


async def predict(task: Task, client: AsyncPoseClient, at_once: int, tick: Callable[[int], Any]) -> list[PhotoFault]:
    """Do the task, `at_once` photos at a time; what is told of each that failed. Raises PoseError, OSError where all would.

    OUT.part stays where one may have an answer the next time: the same command asks for those that failed alone.
    """
    faults: dict[Path, PhotoFault] = {}
    part = Part(None if task.out is None else _part_of(task.out), _head(task))
    places = _places(part, task)
    done = len(places)
    first = part.line_at(next(iter(places.values()))) if places else None
    tick(done)
    waiting = iter([photo for photo in task.photos if photo.file not in places])

    async def work() -> None:
        nonlocal first
        for photo in waiting:
            try:
                answer = await _answer(photo, task, client)
            except PhotoFault as fault:
                faults[photo.file] = PhotoFault(f"{photo.file}: {fault}", fault.passing)
            else:
                first = first or answer
                _check_model(answer, first)
                places[photo.file] = part.append(answer)
            tick(1)

    try:
        await _until_one_fails([asyncio.ensure_future(work()) for _ in range(at_once)])
        if task.out is None or places or not any(fault.passing for fault in faults.values()):  # else an older OUT stays
            _write(task, part, places)
    except BaseException:
        if task.out is not None and len(places) > done:
            click.echo(f"\n{len(places)} photos are done; the same command goes on from there.", err=True)
        part.close(kept=part.holds_lines)
        raise
    part.close(kept=any(fault.passing for fault in faults.values()))
    return [faults[photo.file] for photo in task.photos if photo.file in faults]


async def _until_one_fails(workers: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all, or until one raises, which stops the others."""
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _answer(photo: Photo, task: Task, client: AsyncPoseClient) -> bytes:
    """A line of OUT.part with the data set of one photo, which is drawn if it is to be. Raises PhotoFault."""
    try:
        identity = _identity(photo.file)
        data = await asyncio.to_thread(_content, photo, task.max_bytes)
        pose = await _asked(photo, data, task, client)
        _check_size(photo, pose)
        if task.draw is not None:
            drawn = await asyncio.to_thread(_drawn, photo, data, pose, task.max_pixels)
    except image.ImageTooLarge as error:
        raise PhotoFault(str(error)) from error
    except OSError as error:
        raise PhotoFault(error.strerror or str(error), _passes(error, photo.file)) from error
    if task.draw is not None:
        await asyncio.to_thread(_write_drawn, _drawn_file(photo, task.draw), drawn)
    try:
        return orjson.dumps({"photo": identity, "coco": pose.coco}) + b"\n"
    except TypeError as error:  # numbers or texts that JSON may hold and orjson does not write
        raise NoAnswer(f"{task.run.get('server')} is no pose service: it answers with something else") from error


async def _asked(photo: Photo, data: bytes, task: Task, client: AsyncPoseClient) -> Pose:
    for wait in (*_LATE_WAITS, None):
        try:
            return await client.estimate(data, photo.boxes, **task.options)
        except (Refused, NoAnswer) as error:
            if isinstance(error, NoAnswer) and not isinstance(error.__cause__, httpx.ReadTimeout | httpx.WriteTimeout):
                raise
            late = isinstance(error, NoAnswer) or error.status in _LATE
            if late and wait is not None:
                await asyncio.sleep(wait)
            elif isinstance(error, NoAnswer) or late or error.status == 413 or error.code in _OF_A_PHOTO:
                told = str(error).removeprefix("images.0").lstrip(". ")  # the only one of its request
                raise PhotoFault(told, isinstance(error, NoAnswer) or error.status in _PASSING) from error
            else:
                raise
    raise AssertionError


def _check_size(photo: Photo, pose: Pose) -> None:
    """Raise PhotoFault where the boxes lie in a picture of another size, such as the one that EXIF does not turn."""
    shown = pose.coco["images"][0]
    if photo.size not in (None, (shown["width"], shown["height"])):
        width, height = photo.size
        raise PhotoFault(
            f"its boxes are of {width} × {height} pixels, and upright it has {shown['width']} × {shown['height']}"
        )


def _content(photo: Photo, most: int) -> bytes:
    try:
        photo.name.encode()
    except UnicodeEncodeError as error:
        raise PhotoFault("its name is no UTF-8, in which COCO's files are") from error
    if photo.file.exists() and not photo.file.is_file():
        raise PhotoFault("it is no regular file")
    if (size := photo.file.stat().st_size) > most:
        raise PhotoFault(f"it has {size:,} bytes; at most {most:,} are taken (POSE_MAX_BODY_BYTES)")
    return photo.file.read_bytes()


def _drawn(photo: Photo, data: bytes, pose: Pose, max_pixels: int) -> bytes:
    """The photo with the people's visible joints on it, as a file."""
    picture = image.decode(data, max_pixels)
    shown = np.concatenate([pose.keypoints[..., :2], pose.visible[..., None]], axis=2)
    drawing.draw_people(picture, shown, pose.skeleton, pose.names, 1.0)
    return drawing.encode(picture, _DRAWN.get(photo.file.suffix.lower(), ".jpg"))


def _write_drawn(file: Path, drawn: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as half:
        half.write_bytes(drawn)


def _drawn_file(photo: Photo, folder: Path) -> Path:
    return folder / (photo.name if photo.file.suffix.lower() in _DRAWN else f"{photo.name}.jpg")


def _head(task: Task) -> bytes:
    """The first line of OUT.part: what its answers are of."""
    drawn = None if task.draw is None else os.fsencode(real(task.draw)).hex()  # JSON has no bytes that are not UTF-8
    return orjson.dumps({"options": task.options, "run": task.run, "draw": drawn}) + b"\n"


def _places(part: Part, task: Task) -> dict[Path, int]:
    """Where the answers are that an interrupted run has left in OUT.part."""
    wanted = {tuple(_identity(photo.file)): photo.file for photo in task.photos if _is_done(photo, task)}
    places: dict[Path, int] = {}
    for number, (place, line) in enumerate(part.lines(), 2):
        try:
            photo = wanted.get(tuple(orjson.loads(line)["photo"]))
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise click.UsageError(f"{part.file}: line {number} is damaged; delete it or the file.") from error
        if photo is not None:
            places[photo] = place
    return places


def _is_done(photo: Photo, task: Task) -> bool:
    """Whether a photo may be taken from OUT.part: it is there, and drawn if it is to be."""
    try:
        return photo.file.exists() and (task.draw is None or _drawn_file(photo, task.draw).exists())
    except OSError:
        return False


def _passes(error: OSError, file: Path) -> bool:
    """Whether a file may be read the next time, as on a disk that was away; not where it alone is gone, or forbidden."""
    if error.errno == errno.ENOENT:
        folder = real(file).parent
        try:
            return not any(folder.iterdir())  # as the place where a disk is mounted
        except OSError:
            return not folder.is_dir()
    return error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP)


def _identity(file: Path) -> list[str | int]:
    """What is another of a photo that is another or was changed."""
    told = file.stat()
    return [os.fsencode(file.absolute()).hex(), told.st_size, told.st_mtime_ns]


def _write(task: Task, part: Part, places: Mapping[Path, int]) -> None:
    """All answers as one COCO data set or list of results."""
    pieces = _pieces(task, [photo for photo in task.photos if photo.file in places], lambda p: part.line_at(places[p.file]))
    if task.out is None:
        sys.stdout.buffer.writelines(pieces)
    else:
        with whole_file(task.out) as half, half.open("wb") as opened:
            opened.writelines(pieces)


def _pieces(task: Task, photos: Sequence[Photo], answer_of: Callable[[Photo], bytes]) -> Iterator[bytes]:
    """The text of the answer, a photo at a time: all of them as objects would take a gigabyte for some ten thousand."""
    head: dict[str, Any] = {"info": {}, "categories": []}
    if photos:
        head |= {name: value for name, value in _data_set(answer_of(photos[0])).items() if name in head}
    if task.form == "coco":
        yield orjson.dumps(head)[:-1] + b',"images":['
        for number, photo in enumerate(photos):
            shown = _data_set(answer_of(photo))["images"][0] | {"id": photo.id, "file_name": photo.name}
            yield (b"," if number else b"") + orjson.dumps(shown)
        yield b'],"annotations":['
    else:
        yield b"["
    count = 0
    for photo in photos:
        for person in _data_set(answer_of(photo))["annotations"]:
            count += 1
            told = person | {"id": count, "image_id": photo.id}
            yield (b"," if count > 1 else b"") + orjson.dumps(told if task.form == "coco" else result_of(told))
    yield b"]}\n" if task.form == "coco" else b"]\n"


def _check_model(line: bytes, first: bytes) -> None:
    """Raise PoseError where an answer is of another model than the first one, as of a service that was started anew."""
    now, then = _told_by(line), _told_by(first)
    if then != now:
        raise PoseError(f"The service answers with the model {now} now, and with {then} before.")


def _told_by(line: bytes) -> str:
    """The name/version of the model whose answer a line holds."""
    info = _data_set(line)["info"]
    return f"{info['model']}/{info['model_version']}"


def _data_set(line: bytes) -> dict[str, Any]:
    content: dict[str, Any] = orjson.loads(line)["coco"]
    return content


def sha256_of(file: Path | None) -> str | None:
    """Of a file's content, None without one."""
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
