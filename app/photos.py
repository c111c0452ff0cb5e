"""`lpn predict`: many photos → one COCO file, by any service that a client reaches.

While it runs, each photo's answer is a line of OUT.part, so that a run that was interrupted goes on where it stopped.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson

from app.client import AsyncPoseClient, Options, Pose, Refused
from app.vision import drawing, image

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))
_DRAWN = {".jpg": ".jpg", ".jpeg": ".jpg", ".png": ".png"}
# Problems of one photo; any other would meet all of them.
_OF_A_PHOTO = frozenset(
    (
        "body_too_large",
        "deadline_exceeded",
        "image_too_large",
        "internal_error",
        "invalid_box",
        "invalid_image",
        "request_timeout",
        "too_many_boxes",
    )
)


class _PhotoFault(Exception):
    """One photo has no answer; the others have."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo to look at: its file, what it is called, its id, and its people's boxes if they are known."""

    file: Path
    name: str
    id: int
    boxes: list[list[float]] | None


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with which photos; `out` None is standard output."""

    photos: Sequence[Photo]
    options: Options
    out: Path | None
    form: str  # coco or results
    draw: Path | None
    max_pixels: int  # of a photo that is drawn on


def photos_of(paths: Sequence[Path], boxes: Path | None) -> list[Photo]:
    """The photos that files and folders name, in that order; `boxes` is a COCO data set with their boxes and ids."""
    files: dict[str, Path] = {}
    for path in paths:
        for file, name in _files_of(path):
            if name in files and files[name] != file:
                raise click.UsageError(f"{files[name]} and {file} are both called {name}; name the folder that holds both.")
            files[name] = file
    if boxes is None:
        return [Photo(file, name, number, None) for number, (name, file) in enumerate(files.items())]
    known = _known_boxes(boxes)
    strangers = [name for name in files if name not in known]
    if strangers:
        raise click.UsageError(f"{boxes} has no image called {strangers[0]}; {len(strangers)} of {len(files)} are missing.")
    return [Photo(file, name, *known[name]) for name, file in files.items()]


def _files_of(path: Path) -> list[tuple[Path, str]]:
    if not path.is_dir():
        return [(path, path.name)]
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _SUFFIXES and file.is_file()]
    if not files:
        raise click.UsageError(f"{path} holds no photos ({', '.join(sorted(_SUFFIXES))}).")
    return [(file, file.relative_to(path).as_posix()) for file in files]


def _known_boxes(file: Path) -> dict[str, tuple[int, list[list[float]]]]:
    """File name → id and boxes of each image of a COCO data set; crowds are nobody's boxes."""
    try:
        data = orjson.loads(file.read_bytes())
        known: dict[int, tuple[str, list[list[float]]]] = {each["id"]: (each["file_name"], []) for each in data["images"]}
        for person in data["annotations"]:
            if not person.get("iscrowd", 0):
                known[person["image_id"]][1].append(person["bbox"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        wish = "a COCO data set: images with id and file_name, annotations with image_id and bbox"
        raise click.UsageError(f"{file} is not {wish} ({type(error).__name__}: {error}).") from error
    return {name: (id_, boxes) for id_, (name, boxes) in known.items()}


async def predict(task: Task, client: AsyncPoseClient, at_once: int, tick: Callable[[int], Any]) -> int:
    """Do the task, `at_once` photos at a time; how many photos failed. Raises PoseError and OSError where all would."""
    answers: dict[Path, bytes] = {}
    faults: dict[Path, str] = {}
    part = None if task.out is None else _part(task, task.out, answers)
    done = len(answers)
    tick(done)
    waiting = iter([photo for photo in task.photos if photo.file not in answers])

    async def work() -> None:
        for photo in waiting:
            try:
                answers[photo.file] = await _answer(photo, task, client)
            except _PhotoFault as fault:
                faults[photo.file] = str(fault)
            else:
                if part is not None:
                    line = orjson.dumps({"photo": str(photo.file), "coco": orjson.Fragment(answers[photo.file])})
                    part.write(line + b"\n")
            tick(1)

    try:
        await _until_one_fails([asyncio.ensure_future(work()) for _ in range(at_once)])
    except BaseException:
        if part is not None and len(answers) > done:
            click.echo(f"\n{len(answers)} photos are done; the same command goes on from there.", err=True)
        raise
    finally:
        if part is not None:
            part.close()
    _write(task, answers)
    told = [f"{photo.file}: {faults[photo.file]}" for photo in task.photos if photo.file in faults]
    if told:
        click.echo("\n".join([f"\n{len(told)} of {len(task.photos)} photos failed:", *told]), err=True)
    return len(told)


async def _until_one_fails(workers: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all, or until one raises, which stops the others."""
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _answer(photo: Photo, task: Task, client: AsyncPoseClient) -> bytes:
    """The data set of one photo, which is drawn if it is to be. Raises _PhotoFault where the photo is at fault."""
    try:
        data = await asyncio.to_thread(photo.file.read_bytes)
        pose = await client.estimate(data, photo.boxes, **task.options)
        if task.draw is not None:
            drawn = await asyncio.to_thread(_drawn, photo, data, pose, task.max_pixels)
    except (OSError, image.ImageTooLarge) as error:
        raise _PhotoFault(str(error)) from error
    except Refused as error:
        if error.code not in _OF_A_PHOTO:
            raise
        raise _PhotoFault(str(error)) from error
    if task.draw is not None:
        file = task.draw / (photo.name if photo.file.suffix.lower() in _DRAWN else f"{photo.name}.jpg")
        await asyncio.to_thread(file.parent.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(file.write_bytes, drawn)
    return orjson.dumps(pose.coco)


def _drawn(photo: Photo, data: bytes, pose: Pose, max_pixels: int) -> bytes:
    """The photo with the people's visible joints on it, as a file."""
    picture = image.decode(data, max_pixels)
    shown = np.concatenate([pose.keypoints[..., :2], pose.visible[..., None]], axis=2)
    drawing.draw_people(picture, shown, pose.skeleton, pose.names, 1.0)
    return drawing.encode(picture, _DRAWN.get(photo.file.suffix.lower(), ".jpg"))


def _part(task: Task, out: Path, answers: dict[Path, bytes]) -> FileIO:
    """OUT.part, to write further answers to; those that an interrupted run has left there are put into `answers`."""
    boxed = any(photo.boxes is not None for photo in task.photos)
    head = orjson.dumps({"options": task.options, "boxes": boxed, "draw": None if task.draw is None else str(task.draw)})
    file = _part_of(out)
    part = FileIO(file, "a+")
    part.seek(0)
    found = part.read()
    part.truncate(found.rfind(b"\n") + 1)  # the last line may have broken off
    before, *lines = found.split(b"\n")[:-1] or [b""]
    if before not in (b"", head):
        raise click.UsageError(f"{file} is of a run with other options: start that one again, or delete the file.")
    if not before:
        part.write(head + b"\n")
    wanted = {str(photo.file): photo.file for photo in task.photos}
    for line in lines:
        told = orjson.loads(line)
        if told["photo"] in wanted:
            answers[wanted[told["photo"]]] = orjson.dumps(told["coco"])
    return part


def _part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _write(task: Task, answers: Mapping[Path, bytes]) -> None:
    """All answers as one COCO data set or list of results; a file is there whole or not at all."""
    data: dict[str, Any] = {"info": {}, "images": [], "categories": [], "annotations": []}
    for photo in task.photos:
        if photo.file not in answers:
            continue
        answer = orjson.loads(answers[photo.file])
        data["info"], data["categories"] = answer["info"], answer["categories"]
        data["images"].append(answer["images"][0] | {"id": photo.id, "file_name": photo.name})
        for person in answer["annotations"]:
            data["annotations"].append(person | {"id": len(data["annotations"]) + 1, "image_id": photo.id})
    content = orjson.dumps(data if task.form == "coco" else [_result(person) for person in data["annotations"]]) + b"\n"
    if task.out is None:
        sys.stdout.buffer.write(content)
        return
    half = task.out.with_name(f"{task.out.name}.tmp")
    with half.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.replace(task.out)
    _part_of(task.out).unlink()


def _result(person: dict[str, Any]) -> dict[str, Any]:
    """An annotation as COCO's results have it, with the joints' scores."""
    keypoints = person["keypoints"].copy()
    keypoints[2::3] = person["keypoint_scores"]
    kept = {name: person[name] for name in ("image_id", "category_id", "score", "bbox")}
    return kept | {"keypoints": keypoints}
