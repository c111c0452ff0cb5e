# SPDX-License-Identifier: Apache-2.0
"""Clients of a running service: `PoseClient("http://localhost:8000").estimate("photo.jpg").keypoints`.

They import nothing else of the service. What goes wrong is a PoseError:

    PoseError
    ├── Refused    the service answered with a problem (app/README.md lists them)
    └── NoAnswer   nobody answered, or it is no pose service; the cause is httpx's error, if it was one
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import httpx
import numpy as np
import numpy.typing as npt

__all__ = ["AsyncPoseClient", "NoAnswer", "Options", "Pose", "PoseClient", "PoseError", "Refused"]

Float64 = npt.NDArray[np.float64]
T = TypeVar("T")
Picture = bytes | bytearray | memoryview | str | os.PathLike[str] | npt.NDArray[Any]
Boxes = Sequence[Sequence[float]] | Float64

_URL = "http://localhost:8000"
_TIMEOUT = httpx.Timeout(75, connect=5, pool=None)  # seconds; the service gives a request a minute at most by default
_RETRIES = 6  # 2.4 to 4.7 seconds, where the service names no wait
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 1.6  # seconds, where the answer names none …
_LONGEST_NAMED_WAIT = 60.0  # … and where it does
_STRANGE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # of JSON that is not the service's
_PROBLEMS = "/problems/"  # what the types of the service's own begin with
_AT_ONCE = 16  # requests of an AsyncPoseClient: more would lie in the service's queue, and in memory


class Options(TypedDict, total=False):
    """The options of POST /v1/pose; those left out are the service's defaults."""

    model: str
    keypoint_threshold: float
    detection_threshold: float
    max_people: int
    flip_test: bool
    timeout_ms: int


class PoseError(Exception):
    """No people could be had; the message says why."""


class Refused(PoseError):
    """The service answered with a problem; `code` is "" where the answer came from something before it, as a proxy."""

    def __init__(self, status: int, code: str, detail: str, request_id: str, errors: Sequence[dict[str, Any]]) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.errors = errors  # {"loc": […], "msg"} of each field at fault

    def __reduce__(self) -> tuple[Any, ...]:  # by itself only the message would come through, and stop a pool of processes
        return type(self), (self.status, self.code, str(self), self.request_id, self.errors)


class NoAnswer(PoseError):
    """The service could not be reached, did not answer in time, or is no pose service."""


@dataclass(frozen=True, slots=True)
class Pose:
    """The people of one picture. Places are in pixels of the upright picture; (0, 0) is the centre of the top left one."""

    width: int
    height: int
    boxes: Float64  # [N, 4]: x, y, width, height
    box_scores: Float64  # [N], 1 for given boxes
    scores: Float64  # [N]
    keypoints: Float64  # [N, K, 3]: x, y, score
    visible: npt.NDArray[np.bool_]  # [N, K]: whether the score is at or over the threshold
    errors: Float64 | None  # [N, K]: expected pixels off the true place; None of a model without calibration
    names: tuple[str, ...]  # [K], of the joints
    skeleton: tuple[tuple[int, int], ...]  # pairs of joints, counted from 1 as in COCO
    coco: dict[str, Any]  # the answer itself, a COCO keypoint data set


class PoseClient:
    """Asks one service, over connections that it keeps. Several threads may share it, and so may processes that are forked
    (with a `transport` they share its connections, though). Close it, or use it in a `with`.

    A request that is refused with 429 or 503 is sent again, `retries` times at most, after the wait that the service names (a
    minute at most, and up to a third more, so that not all come back at once), and so is one whose connection breaks.
    """

    def __init__(
        self,
        url: str = _URL,
        *,
        key: str | None = None,
        retries: int = _RETRIES,
        timeout: httpx.Timeout | float = _TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._opened = _opener(httpx.Client, url, key, timeout, transport)
        self._http, self._process = self._opened(), os.getpid()

    def estimate(self, picture: Picture, boxes: Boxes | None = None, **options: Unpack[Options]) -> Pose:
        """The people of a picture: a file's path or bytes, or pixels [H, W] or [H, W, 3] (uint8, BGR as OpenCV has them).

        `boxes` [N, 4] are the people, x, y, width, height; without them the service finds them. Raises PoseError, OSError
        where the file cannot be read, and ValueError for pixels of another kind, boxes that are none and unknown options.
        None, as OpenCV gives it for a file that it cannot read, is a ValueError too.
        """
        return _pose_of(self._ask("POST", "/v1/pose", **_request(picture, boxes, options)), picture)

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` tells of each model. Raises PoseError."""
        return _models_of(self._ask("GET", "/v1/models"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        if os.getpid() != self._process:  # forked: over its parent's connections answers would be mixed up
            self._http, self._process = self._opened(), os.getpid()
        tries = 0
        while True:
            try:
                response = self._http.request(method, path, **request)
            except httpx.RequestError as error:
                wait = _wait_after_failure(error, tries, self._retries)
            else:
                if response.is_success:
                    return response
                wait = _wait_after(response, tries, self._retries)
            tries += 1
            time.sleep(wait)


class AsyncPoseClient:
    """PoseClient for asyncio: many pictures at once, as by
    `await asyncio.gather(*map(client.estimate, photos), return_exceptions=True)`; without the last argument one bad photo
    would let the others go on with a client that is closed meanwhile.

    It belongs to one event loop, and has `at_once` requests on their way at most.
    """

    def __init__(
        self,
        url: str = _URL,
        *,
        key: str | None = None,
        retries: int = _RETRIES,
        timeout: httpx.Timeout | float = _TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
        at_once: int = _AT_ONCE,
    ) -> None:
        self._retries = retries
        self._turns = asyncio.Semaphore(at_once)
        self._http = _opener(httpx.AsyncClient, url, key, timeout, transport)()

    async def estimate(self, picture: Picture, boxes: Boxes | None = None, **options: Unpack[Options]) -> Pose:
        """As PoseClient.estimate."""
        async with self._turns:
            request = await asyncio.to_thread(_request, picture, boxes, options)
            return _pose_of(await self._ask("POST", "/v1/pose", **request), picture)

    async def models(self) -> list[dict[str, Any]]:
        """As PoseClient.models."""
        return _models_of(await self._ask("GET", "/v1/models"))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        tries = 0
        while True:
            try:
                response = await self._http.request(method, path, **request)
            except httpx.RequestError as error:
                wait = _wait_after_failure(error, tries, self._retries)
            else:
                if response.is_success:
                    return response
                wait = _wait_after(response, tries, self._retries)
            tries += 1
            await asyncio.sleep(wait)


def _opener(
    kind: Callable[..., T], url: str, key: str | None, timeout: httpx.Timeout | float, transport: Any
) -> Callable[[], T]:
    """What makes a client of httpx. Raises ValueError for an address or a key that is none; so does what is given, where the
    environment names a proxy or certificates that cannot be used."""
    address, headers = _checked(url), _headers(key)

    def opened() -> T:
        try:
            return kind(base_url=address, headers=headers, timeout=timeout, transport=transport)
        except OSError as error:  # of a file that is not there, or holds no certificates; it has no name
            told = error.strerror or error
            raise ValueError(f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read: {told}") from error
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ValueError(f"what HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY says cannot be used: {error}") from error

    return opened


def _checked(url: str) -> httpx.URL:
    """Raise ValueError where a client could ask nobody."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no address of a service: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is no address of a service; one is http://localhost:8000")
    return parsed


def _headers(key: str | None) -> dict[bytes, bytes]:
    headers = {b"Accept": b"application/json"}
    if key is not None:
        if not key.isprintable() or key != key.strip():
            raise ValueError("the key holds characters, as the end of a line, that a header cannot")
        headers[b"X-API-Key"] = key.encode()
    return headers


def _request(picture: Picture, boxes: Boxes | None, options: Options) -> dict[str, Any]:
    """The body and query of a request; boxes stand in a form, since a query has no room for many."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise ValueError(f"there is no option {min(unknown)!r}; there are {', '.join(Options.__annotations__)}")
    query = {name: value for name, value in options.items() if value is not None}
    file = _file_of(picture)
    if boxes is None:
        return {"content": file, "params": query, "headers": {"Content-Type": "application/octet-stream"}}
    try:
        rows = np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"boxes are [N, 4], x, y, width, height of each: {error}") from error
    if rows.size and (rows.ndim != 2 or rows.shape[1] != 4):
        raise ValueError(f"boxes are [N, 4], x, y, width, height of each; these are {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ValueError(f"boxes are finite numbers; box {int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])} is not")
    return {"files": {"image": (None, file)}, "data": {"boxes": json.dumps(rows.tolist())}, "params": query}


def _file_of(picture: Picture) -> bytes:
    if picture is None:
        raise ValueError("None is no picture; cv2.imread gives it for a file that it cannot read")
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if not isinstance(picture, np.ndarray):
        return Path(picture).read_bytes()
    colour = picture.ndim == 3 and picture.shape[2] == 3
    if picture.dtype != np.uint8 or not (colour or picture.ndim == 2) or not picture.size:
        raise ValueError(f"pixels are uint8 [H, W] or [H, W, 3]; these are {picture.dtype} {list(picture.shape)}")
    import cv2  # noqa: PLC0415 - who sends files need not have it

    written, file = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise ValueError(f"pixels of {list(picture.shape)} make no PNG file")
    return file.tobytes()


def _wait_after_failure(error: httpx.RequestError, tries: int, retries: int) -> float:
    """Seconds until a request is sent again that was not answered. Raises NoAnswer where it is not to be."""
    # Who did not answer in time would do the work once more.
    passing = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout)
    if not passing or tries >= retries:
        raise NoAnswer(f"{_origin(error.request.url)} gives no answer: {str(error) or type(error).__name__}") from error
    return _waited(tries)


def _wait_after(response: httpx.Response, tries: int, retries: int) -> float:
    """Seconds until a request is sent again that was refused. Raises Refused where it is not to be."""
    if response.status_code not in (429, 503) or tries >= retries:
        raise _refused(response)
    named = response.headers.get("Retry-After", "")
    if not (named.isascii() and named.isdecimal()):
        return _waited(tries)
    return min(float(named), _LONGEST_NAMED_WAIT) * random.uniform(1.0, 1.3)  # noqa: S311 - not all clients at once


def _waited(tries: int) -> float:
    """Twice as long each time, and not for all clients the same."""
    return min(_FIRST_WAIT * 2.0 ** min(tries, 10), _LONGEST_WAIT) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def _refused(response: httpx.Response) -> Refused:
    request_id = response.headers.get("X-Request-ID", "")
    try:
        told = response.json()
        kind, detail = told["type"], told["detail"]
        errors = [dict(error) for error in told.get("errors") or []]
        if kind.startswith(_PROBLEMS) and isinstance(detail, str):
            return Refused(response.status_code, kind.removeprefix(_PROBLEMS), detail, request_id, errors)
    except (*_STRANGE, AttributeError):
        pass  # not the service's own words, nor are problems of other kinds
    detail = f"{_origin(response.url)} answers {response.status_code} {response.reason_phrase}"
    return Refused(response.status_code, "", detail, request_id, [])


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode()}"


def _pose_of(response: httpx.Response, picture: Picture) -> Pose:
    try:
        data = response.json()
        (image,), (category,), people = data["images"], data["categories"], data["annotations"]
        joints = len(category["keypoints"])
        skeleton = tuple((first, second) for first, second in category["skeleton"])
        info = data["info"]
        image["file_name"] = Path(picture).name if isinstance(picture, str | os.PathLike) else None
        names = (*category["keypoints"], info["model"], info["model_version"])
        if not all(isinstance(name, str) for name in names) or not all(
            isinstance(end, int) and 0 < end <= joints for pair in skeleton for end in pair
        ):
            raise ValueError("names that are none, or a skeleton of other joints")

        def column(name: str, *shape: int) -> Float64:
            return np.array([person[name] for person in people], np.float64).reshape(len(people), *shape)

        keypoints = column("keypoints", joints, 3)
        visible = keypoints[..., 2] > 0
        keypoints[..., 2] = column("keypoint_scores", joints)
        if not np.isfinite(keypoints).all():
            raise ValueError("places that are nowhere")
        calibrated = not any(person["keypoint_errors"] is None for person in people)
        return Pose(
            width=int(image["width"]),
            height=int(image["height"]),
            boxes=column("bbox", 4),
            box_scores=column("bbox_score"),
            scores=column("score"),
            keypoints=keypoints,
            visible=visible,
            errors=column("keypoint_errors", joints) if calibrated else None,
            names=tuple(category["keypoints"]),
            skeleton=skeleton,
            coco=data,
        )
    except _STRANGE as error:
        raise _stranger(response) from error


def _models_of(response: httpx.Response) -> list[dict[str, Any]]:
    try:
        return [{**model, "sha256": model["sha256"]} for model in response.json()["models"]]
    except _STRANGE as error:
        raise _stranger(response) from error


def _stranger(response: httpx.Response) -> NoAnswer:
    return NoAnswer(f"{_origin(response.url)} is no pose service: it answers with something else")
