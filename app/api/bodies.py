"""The three request bodies (a picture, multipart/form-data, JSON) → one PoseRequest."""

import asyncio
import base64
import binascii
import codecs
import re
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from app.api.boxes import boxes_of_one, boxes_of_several, checked_boxes
from app.api.problems import FieldError, Location, Problem, at
from app.api.schemas import JsonBody, JsonImage, Options
from app.settings import Settings

PICTURE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff", "application/octet-stream")
_OPTIONS = (*Options.model_fields, "boxes")
_STREAM_OPTIONS = tuple(name for name in Options.model_fields if name != "format")
# A form has no charset (RFC 7578), but Apache's HttpClient 5.1 names one of these by itself.
_FORM_CHARSETS = frozenset((b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1"))
_FORM_FIELDS = 32  # beside a field for each box
_BLANKS = re.compile(rb"[ \t]{101}")  # behind a boundary, where a parser passes over them one by one
_EXTENDED_NAME = re.compile(rb"(?i);\s*filename\*\s*=\s*utf-8'[^']*'([^;\s]+)")
_FIELD_BYTES = 2**20  # of a form's field: 1,600 boxes of long numbers are a tenth of it
_JSON_TOKENS = 200_000  # brackets and commas; 1,600 boxes are 8,000, and a small body of more makes objects without number
_NAME_BYTES = 255  # of a file, in the file systems that people have
_TOLD_ERRORS, _TOLD_CHARACTERS = 20, 80  # of what a client made up: an answer stays small
_WISHES = {  # pydantic's kind of error → what it must be, in our words
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than_equal": "{ge} or more",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "an object",
    "string_too_long": "of {max_length} characters at most",
    "string_type": "a text",
    "too_short": "a list of one picture or more",
}


@dataclass(frozen=True, slots=True)
class PictureIn:
    """A picture file of a request; `boxes` [N, 4] or None where the client gives none."""

    id: int
    file_name: str | None
    data: bytes
    boxes: npt.NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class PoseRequest:
    """What a client asks of POST /v1/pose, whatever the body was."""

    pictures: list[PictureIn]
    options: Options


async def read_pose_request(request: Request, settings: Settings) -> PoseRequest:
    """Read and check a request. Raises Problem."""
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise Problem(
            "unsupported_media_type", f"Content-Encoding is {coding[:80]}; bodies are taken as they are, uncompressed."
        )
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    query = _single_values(request.query_params.multi_items(), "query")
    if kind == "multipart/form-data":
        asked = await _from_form(request, query, settings)
    elif kind == "application/json":
        asked = await asyncio.to_thread(_from_json, await request.body(), query, settings)
    elif kind in PICTURE_TYPES:
        data = await request.body()
        _check_is_no_name(data, 0)
        boxes = boxes_of_one(query.pop("boxes", None), ("query", "boxes"), settings)
        asked = PoseRequest([PictureIn(0, None, data, boxes)], _options(query, "query", settings))
    else:
        raise Problem(
            "unsupported_media_type",
            f"Content-Type is {kind or 'missing'}; send one of {', '.join(PICTURE_TYPES)} (curl: -H 'Content-Type: "
            "image/jpeg'), multipart/form-data or application/json.",
        )
    return asked


def read_stream_options(query: QueryParams, settings: Settings) -> Options:
    """The options of a stream: those of a request but for its form, since the answers of a stream have one alone. Raises
    Problem."""
    values = _single_values(query.multi_items(), "query")
    for name in ("boxes", "format"):
        if name in values:
            raise at("invalid_option", ("query", name), "is not taken by a stream")
    return _options(values, "query", settings, _STREAM_OPTIONS)


async def _from_form(request: Request, query: dict[str, str], settings: Settings) -> PoseRequest:
    form = await _parsed_form(request, settings)
    try:
        files = [part for name, part in form.multi_items() if isinstance(part, UploadFile) and name == "image"]
        fields = []
        for name, part in form.multi_items():
            if isinstance(part, str):
                fields.append((name, part))
            elif name != "image":
                known = name in _OPTIONS
                what = "must have no file name" if known else "is not a known part; name the parts with pictures image"
                raise at("invalid_option", ("form", name), what)
        if not files:
            raise Problem("invalid_image", "The form holds no part named image with a file (curl: -F image=@people.jpg).")
        _check_count(len(files), settings)
        in_form = _single_values(fields, "form")
        repeated = query.keys() & in_form.keys()
        if repeated:
            raise at("invalid_option", ("form", min(repeated)), "is given in the query as well")
        where, holder = ("query", query) if "boxes" in query else ("form", in_form)
        boxes = boxes_of_several(holder.pop("boxes", None), (where, "boxes"), len(files), settings)
        pictures = [
            PictureIn(number, file.filename or None, await file.read(), boxes[number]) for number, file in enumerate(files)
        ]
        for picture in pictures:
            _check_is_no_name(picture.data, picture.id)
        options = _options(query, "query", settings).model_copy(
            update=_options(in_form, "form", settings).model_dump(exclude_unset=True)
        )
        return PoseRequest(pictures, options)
    finally:
        await form.close()


class _FormParser(MultiPartParser):
    """Starlette's parser with an eye for the closing boundary, for which a picture needs no file name.

    Its own takes a form that breaks off for a whole one, a part without a file name for a field, and passes over filename*=,
    which no form should hold, but .NET's have for names beyond ASCII, besides one that is no name.
    """

    ended = False

    def on_headers_finished(self) -> None:
        self._charset = "utf-8"  # whatever the form names; what is none is taken for ISO-8859-1
        disposition = self._current_part.content_disposition or b""
        _, of_part = parse_options_header(disposition)
        if extended := _EXTENDED_NAME.search(disposition):
            name = unquote_to_bytes(extended[1]).replace(b"\\", b"\\\\").replace(b'"', b'\\"')
            self._current_part.content_disposition = disposition + b'; filename="' + name + b'"'  # the last one counts
        elif of_part.get(b"name") == b"image" and b"filename" not in of_part:
            self._current_part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()

    def on_end(self) -> None:
        self.ended = True


async def _of_few_parts(stream: AsyncGenerator[bytes, None], delimiter: bytes, most: int) -> AsyncGenerator[bytes, None]:
    """The same, as long as the delimiter is in it for so many parts at most, without many blanks behind it. Raises Problem.

    The parser, which runs in the event loop, passes over other bytes at once, and looks at these one by one.
    """
    parts, before = 0, b"\r\n"  # the first one needs no line before it
    async for chunk in stream:
        both = before + chunk
        for found in re.finditer(re.escape(delimiter), both):
            parts += found.end() > len(before)
            if parts > most + 1:  # the last one closes the form
                yield chunk[: found.end() - len(before)]  # the parser may know what there is too much of
                raise Problem("malformed_body", f"The body holds the boundary of multipart/form-data over {most + 1} times.")
            if _BLANKS.match(both, found.end()):
                raise Problem("malformed_body", "The body holds over 100 blanks behind a boundary of multipart/form-data.")
        before = both[-(len(delimiter) + 100) :]
        yield chunk


async def _parsed_form(request: Request, settings: Settings) -> FormData:
    _, parameters = parse_options_header(request.headers["content-type"])
    charset = parameters.get(b"charset", b"utf-8").lower()
    if charset not in _FORM_CHARSETS:  # Python knows charsets that make no text
        raise Problem(
            "malformed_body", "multipart/form-data is taken in UTF-8 alone; its Content-Type names another charset."
        )
    most_files, most_fields = 10 * settings.max_images, settings.max_boxes + _FORM_FIELDS
    delimiter = b"\r\n--" + parameters.get(b"boundary", b"")
    parser = _FormParser(
        request.headers,
        _of_few_parts(request.stream(), delimiter, most_files + most_fields),
        max_files=most_files,
        max_fields=most_fields,
        max_part_size=_FIELD_BYTES,
    )
    parser.spool_max_size = settings.max_body_bytes  # parts stay in memory: the body is limited already
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        if "Too many files" in str(error):
            raise _too_many_images(f"more than {most_files}", settings) from error
        if "Too many fields" in str(error):
            raise Problem("malformed_body", f"The form holds over {most_fields} fields beside its pictures.") from error
        if "maximum size" in str(error):
            raise Problem("malformed_body", f"A field of the form has over {_FIELD_BYTES:,} bytes.") from error
        raise Problem("malformed_body", "The body is not valid multipart/form-data, or its boundary is missing.") from error
    if not parser.ended:
        await form.close()
        raise Problem("malformed_body", "The body ends before the closing boundary of multipart/form-data.")
    return form


def _json_object(body: bytes, settings: Settings) -> dict[str, Any]:
    most = max(_JSON_TOKENS, 6 * settings.max_images * settings.max_boxes)  # five and one to spare for each box
    if body.count(b",") + body.count(b"[") + body.count(b"{") > most:
        raise Problem("malformed_body", f"The body holds over {most:,} brackets and commas.")
    try:
        content = orjson.loads(body.removeprefix(codecs.BOM_UTF8))  # which some of Windows' tools write
    except orjson.JSONDecodeError as error:
        raise Problem(
            "malformed_body",
            f"The body is not valid JSON, or holds a number out of range (line {error.lineno}, column {error.colno}).",
        ) from error
    if not isinstance(content, dict):
        raise Problem("malformed_body", "The body must be a JSON object with a list named images.")
    return content


def _from_json(body: bytes, query: dict[str, str], settings: Settings) -> PoseRequest:
    content = _json_object(body, settings)
    _refuse_strangers(content, JsonBody.model_fields, ())
    images = content.get("images")
    if isinstance(images, list):
        _check_count(len(images), settings)
        for number, picture in enumerate(images):
            if isinstance(picture, dict):
                _refuse_strangers(picture, JsonImage.model_fields, ("images", number))
    repeated = query.keys() & content.keys()
    if repeated:
        raise at("invalid_option", ("query", min(repeated)), "is given in the body as well")
    if "boxes" in query:
        raise at("invalid_option", ("query", "boxes"), "is not taken beside JSON; give each picture its own boxes there")
    in_query = _options(query, "query", settings)
    try:
        parsed = JsonBody.model_validate(content, strict=True)  # true is no number, and "yes" is not true
    except ValidationError as error:
        raise _of_errors([_told(found) for found in error.errors()]) from error
    _check_limits(parsed, settings)
    pictures = [_json_picture(number, picture, settings) for number, picture in enumerate(parsed.images)]
    ids = [picture.id for picture in pictures]
    for number, id_ in enumerate(ids):
        if id_ in ids[:number]:
            told = f"is {id_}, as another picture's; a picture without an id has its place, 0, 1, 2 …"
            raise at("invalid_option", ("images", number, "id"), told)
    return PoseRequest(pictures, Options(**parsed.model_dump(exclude={"images"}) | in_query.model_dump(exclude_unset=True)))


def _json_picture(number: int, picture: JsonImage, settings: Settings) -> PictureIn:
    text = picture.data
    if not text.isascii():  # any copy of it might take four times the bytes of the body
        raise at("invalid_image", ("images", number, "data"), "is not valid base64")
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise at("invalid_image", ("images", number, "data"), "is a data: text without base64")
    try:
        data = base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)  # it often comes in lines
    except (binascii.Error, ValueError) as error:
        raise at("invalid_image", ("images", number, "data"), "is not valid base64") from error
    boxes = None if picture.boxes is None else checked_boxes(picture.boxes, ("images", number, "boxes"), settings)
    return PictureIn(number if picture.id is None else picture.id, picture.file_name, data, boxes)


def _check_is_no_name(data: bytes, number: int) -> None:
    """Refuse a text where a picture should be: what curl sends where the @ before a file's name is missing."""
    if 0 < len(data) <= _NAME_BYTES and data.isascii() and (text := data.decode()).isprintable():
        told = f"is the text {text[:_TOLD_CHARACTERS]!r} and no picture (with curl, @ goes before a file's name)"
        raise at("invalid_image", ("images", number), told)


def _single_values(items: Sequence[tuple[str, str]], where: str) -> dict[str, str]:
    """Name → value; repeated boxes are joined, any other option may be given once."""
    values: dict[str, str] = {}
    for name, value in items:
        if name in values and name != "boxes":
            raise at("invalid_option", (where, name), "is given twice")
        joined = f"{values[name]};{value}" if name in values else value
        if len(joined) > _FIELD_BYTES:  # one field alone is no longer
            raise Problem("malformed_body", f"The fields {name} of the form have over {_FIELD_BYTES:,} bytes together.")
        values[name] = joined
    return values


def _options(values: Mapping[str, str], where: str, settings: Settings, known: Sequence[str] = _OPTIONS) -> Options:
    _refuse_strangers(values, known, (where,))
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        raise _of_errors([_told(found, where) for found in error.errors()]) from error
    _check_limits(options, settings, where)
    return options


def _refuse_strangers(values: Mapping[str, Any], known: Collection[str], where: Location) -> None:
    """Raise Problem for names that `known` has not, before pydantic makes an error of each: there may be many thousand."""
    strangers = list(islice((name for name in values if name not in known), _TOLD_ERRORS))
    if strangers:
        names = ", ".join(known)
        told = [FieldError((*where, name[:_TOLD_CHARACTERS]), f"is not known; known are {names}") for name in strangers]
        raise _of_errors(told)


def _told(found: ErrorDetails, *where: str) -> FieldError:
    """What pydantic found, in our words."""
    loc = (*where, *found["loc"])
    if found["type"] == "missing":
        return FieldError(loc, "is missing")
    given = found["input"][:_TOLD_CHARACTERS] if isinstance(found["input"], str) else found["input"]
    value = orjson.dumps(given, default=str).decode() if isinstance(given, str | float | int) else ""
    wish = _WISHES.get(found["type"], "of another form").format(**found.get("ctx", {}))
    return FieldError(loc, f"must be {wish}" + (f"; it is {value[:_TOLD_CHARACTERS]}" if value else ""))


def _of_errors(errors: Sequence[FieldError]) -> Problem:
    return Problem("invalid_option", f"{'.'.join(map(str, errors[0].loc))} {errors[0].msg}.", errors[:_TOLD_ERRORS])


def _check_limits(options: Options, settings: Settings, *where: str) -> None:
    """The limits of options that depend on the settings."""
    if options.timeout_ms is not None and options.timeout_ms > settings.max_timeout_ms:
        raise at(
            "invalid_option", (*where, "timeout_ms"), f"is {options.timeout_ms}; at most {settings.max_timeout_ms} is taken"
        )
    if options.max_people is not None and options.max_people > settings.max_boxes:
        raise at("invalid_option", (*where, "max_people"), f"is {options.max_people}; at most {settings.max_boxes} is taken")


def _check_count(count: int, settings: Settings) -> None:
    if count > settings.max_images:
        raise _too_many_images(str(count), settings)


def _too_many_images(count: str, settings: Settings) -> Problem:
    return Problem("too_many_images", f"The request holds {count} pictures; at most {settings.max_images} are taken.")
