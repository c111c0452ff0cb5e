"""Picture files: what a header tells before any decoding, and bytes → upright BGR picture.

OpenCV decodes and turns pictures upright. It is silent about files that end early, so the end is looked for here.
"""

import contextlib
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]

# Scans of a JPEG within a TIFF, which has one for each component at most: those below are taken. libtiff itself takes 99.
os.environ.setdefault("LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER", "5")

FORMATS = "JPEG, PNG, WebP, BMP or TIFF"
_MAX_SIDE = 32_766  # OpenCV warps no larger picture
_JPEG_SCANS = 100  # a scan of 26 bytes costs a pass over all pixels; encoders write about ten …
_JPEG_SCANNED = 20  # … so many times the pixels that a picture may have in all scans together: a second of 50 million
# An arithmetic scan takes three times as long, and browsers show none; a lossless file is not decoded smaller.
_JPEG_UNREAD = dict.fromkeys((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF), "with arithmetic coding") | {0xC3: "in lossless coding"}
_JPEG_SEGMENTS = 5_000  # may be empty, and are looked at one by one; a large colour profile or XMP is some hundred
_PNG_CHUNKS = _WEBP_CHUNKS = 100_000  # the same; encoders that write 8 KB in each fill 32 MiB with 4,000
# What is handed to the decoder. It would inflate every text and colour profile, 8 KB to 8 MB, and tell of odd chunks in lines
# of its own on standard error, in which a profile may have any name. For an animation's it would hold several whole pictures.
_PNG_ONCE = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IEND"}
_PNG_READ = {b"IDAT"} | _PNG_ONCE
_TIFF_VALUE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), 1)) | {16: 8, 17: 8, 18: 8}  # of each type
_TIFF_LENGTHS = {3: "u2", 4: "u4", 8: "u2", 9: "u4", 16: "u8", 17: "u8"}  # of a strip: types; a byte tells little
# What a segment of a JPEG holds. Each entry of a block may name the same text, which is copied each time.
_EXIF_BYTES = 65_535
_JPEG_EXIFS = 8  # a file has one
_TIFF_STRIPS = 200_000  # each costs as much as some 30 pixels; a picture has as many as rows, in each of four colours
# Of the first page, or where it is left out: thumbnail, width, height, compression, colours, whether these lie apart (2).
_TIFF_NUMBERS = {254: 0, 256: 0, 257: 0, 259: 1, 262: 0, 284: 1}
_TIFF_PAGES = 10_000  # may be six bytes each
_TIFF_TILES = (322, 323, 324, 325)  # tags; a decoder fills each to its rim, far beyond the picture, and turns it for itself
_TIFF_CIELAB = 8  # a strip of it costs as much as thousands of pixels; cameras write none
# Any with a segment, and SOI and EOI. Not those below: where libjpeg expects a restart, it knows no length of them, and finds
# and decodes the scans behind.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_LARGE = 640 * 640  # pixels
# Of OpenCV, to decode each side that many times smaller.
FLAGS = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_INFLATED_AT_ONCE = 2**20  # bytes
_PACKED_AT_ONCE = 65_536  # bytes
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes
_BMP_MASKS = (0xFF0000, 0xFF00, 0xFF)  # red, green, blue in 32 bits; OpenCV takes any for these
# None, LZW, Deflate, PackBits. OpenCV reads some others as black without a word; a JPEG within may be of any size: 274 bytes
# took 4 GB; what fax machines write is no photo.
_TIFF_COMPRESSIONS = (1, 5, 8, 32_773, 32_946)


class InvalidImage(Exception):
    """The bytes are not a picture that can be read; the message says why."""


class ImageTooLarge(Exception):
    """The picture has more pixels than allowed, or a longer side."""


@dataclass(frozen=True, slots=True)
class Header:
    """A picture's format, its stored size in pixels (before a turn by EXIF), whether it may carry EXIF, a JPEG's scans."""

    format: str
    width: int
    height: int
    exif: bool = True
    scans: int = 1


def read_header(data: bytes) -> Header:
    """The header of a picture file. Raises InvalidImage for other bytes, files that end early, and kinds that
    are not read."""
    if not data:
        raise InvalidImage("is empty")
    for magic, format_, measure in _READERS:
        if data.startswith(magic) and (format_ != "WebP" or data[8:12] == b"WEBP"):
            try:
                header = measure(data)
            except (struct.error, IndexError, ValueError) as error:
                raise InvalidImage(f"is a {format_} file that ends early") from error
            if header.width < 1 or header.height < 1:
                raise InvalidImage(f"is a {format_} file of {header.width} × {header.height} pixels")
            return header
    for start, magic, kind in _UNREAD:
        if data.startswith(magic, start):
            raise InvalidImage(f"is a {kind} file, which is not read; send it as JPEG")
    raise InvalidImage(f"is not a {FORMATS} file")


def decode(data: bytes, max_pixels: int, reduction: int = 1, header: Header | None = None) -> UInt8:
    """A picture file → its upright pixels [H, W, 3], 8-bit BGR; the first frame of an animation; alpha is left out
    (a TIFF's is blended onto black). `reduction` (1, 2, 4, 8): each side that many times smaller, which a JPEG gives cheaply:
    its pixels are the means of squares of the whole picture's. `header` is the file's where it was read already.

    Raises InvalidImage, ImageTooLarge from the header alone, and MemoryError.
    """
    header = header or read_header(data)
    if header.width * header.height > max_pixels or max(header.width, header.height) > _MAX_SIDE:
        raise ImageTooLarge(
            f"has {header.width} × {header.height} = {header.width * header.height:,} pixels; at most {max_pixels:,} "
            f"pixels and {_MAX_SIDE:,} a side are taken"
        )
    if header.scans * header.width * header.height > _JPEG_SCANNED * max_pixels:
        raise InvalidImage(
            f"is a JPEG file whose {header.scans} scans have over {_JPEG_SCANNED * max_pixels:,} pixels together"
        )
    if header.format == "PNG":
        _check_png_data(data, header)
        data = _what_is_read(data)
    if header.format == "WebP":
        data = _with_bare_exif(data)
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), FLAGS[reduction])
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        picture = None
    if picture is None:
        raise InvalidImage(f"is a {header.format} file that is damaged or of a kind that is not read")
    sides = np.sort(np.array(picture.shape[:2])) - np.sort([header.width, header.height]) / reduction
    if (np.abs(sides) >= 1).any():
        raise InvalidImage(f"is a {header.format} file whose header does not match its content")
    return np.asarray(picture, np.uint8)


def reduction(header: Header, most: float) -> int:
    """How many times smaller, `most` at most, a picture file is decoded at less cost: 1 for all but JPEG."""
    return next((times for times in (8, 4, 2) if times <= most), 1) if header.format == "JPEG" else 1


def crop_reduction(header: Header, most: float) -> int:
    """As `reduction`, for crops: 1 up to 640 × 640 pixels, so that COCO's photos are cut as the reference cuts them. It
    divides both sides of a picture that EXIF may turn: what is left over at the end would come first."""
    if header.width * header.height <= _LARGE:
        return 1
    times = reduction(header, most)
    return math.gcd(times, header.width, header.height) if header.exif else times


def upright_size(picture: UInt8, header: Header, times: int) -> tuple[int, int]:
    """Width and height of the whole upright picture of which `picture` was decoded, smaller by a `crop_reduction`."""
    height, width = picture.shape[:2]
    return (width * times, height * times) if header.exif else (header.width, header.height)


def _measure_jpeg(data: bytes) -> Header:
    """The size from the frame header, once every scan up to the end-of-image marker is there.

    OpenCV paints what is missing of a truncated JPEG grey.
    """
    size: tuple[int, int] | None = None
    scans, segments, exif, exifs = 0, 0, False, 0
    position = 2
    while found := _JPEG_MARKER.search(data, position):
        marker, position = data[found.end() - 1], found.end()
        if marker == 0xD9 and size is not None and scans:
            return Header("JPEG", *size, exif, scans)
        if marker in (0xD8, 0xD9):
            raise InvalidImage("is a JPEG file without a whole picture")
        segments += 1
        if segments > _JPEG_SEGMENTS:
            raise InvalidImage(f"is a JPEG file of more than {_JPEG_SEGMENTS:,} segments")
        (length,) = struct.unpack_from(">H", data, position)
        if marker in _JPEG_UNREAD:
            raise InvalidImage(f"is a JPEG file {_JPEG_UNREAD[marker]}, which is not read")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 3)
            if size is not None:
                raise InvalidImage("is a JPEG file with two frame headers")
            size = (width, height)
        exif |= marker == 0xE1  # or XMP: OpenCV looks into any APP1
        exifs += marker == 0xE1 and data.startswith(b"Exif\0\0", position + 2)
        if exifs > _JPEG_EXIFS:
            raise InvalidImage(f"is a JPEG file of more than {_JPEG_EXIFS} blocks of EXIF")
        scans += marker == 0xDA
        if scans > _JPEG_SCANS:
            raise InvalidImage(f"is a JPEG file of more than {_JPEG_SCANS} scans")
        position += length
    raise InvalidImage("is a JPEG file that ends early")


def _measure_png(data: bytes) -> Header:
    """The size of the header chunk, once the chunks are there up to the last."""
    first, name, width, height = struct.unpack_from(">I4sII", data, 8)
    if (first, name) != (13, b"IHDR"):
        raise InvalidImage("is a PNG file that does not begin with its header")
    for number, (kind, begin, end) in enumerate(_png_chunks(data)):
        if number == _PNG_CHUNKS:
            raise InvalidImage(f"is a PNG file of more than {_PNG_CHUNKS:,} chunks")
        if kind == b"eXIf":
            _check_exif("PNG", end - begin - 12)
        if end > len(data):
            raise InvalidImage("is a PNG file that ends early")
    return Header("PNG", width, height)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind, begin and end of each chunk up to the last. Raises struct.error where the file ends before it."""
    kind, end = b"", 8
    while kind != b"IEND":
        begin = end
        length, kind = struct.unpack_from(">I4s", data, begin)
        end = begin + 12 + length
        yield kind, begin, end


def _check_png_data(data: bytes, header: Header) -> None:
    """Raise InvalidImage where the pixels' data inflates to more than the pixels need: a megabyte may become a gigabyte, and
    libpng inflates to the end whatever the size of the picture."""
    depth, colours = data[24], {2: 3, 4: 2, 6: 4}.get(data[25], 1)
    # with a byte for the filter and one of padding for each row, of which Adam7 makes nearly two
    left = header.width * header.height * depth * colours // 8 + 4 * header.height + 16
    inflate = zlib.decompressobj()
    with contextlib.suppress(zlib.error):  # the decoder judges
        for kind, begin, end in _png_chunks(data):
            if kind != b"IDAT":
                continue
            # In small parts: whatever is left of one is copied for each further megabyte.
            for start in range(begin + 8, end - 4, _PACKED_AT_ONCE):
                packed = data[start : min(start + _PACKED_AT_ONCE, end - 4)] if not inflate.eof else b""
                while packed:
                    left -= len(inflate.decompress(packed, _INFLATED_AT_ONCE))
                    if left <= 0:
                        raise InvalidImage("is a PNG file with more data than its pixels need")
                    packed = inflate.unconsumed_tail


def _what_is_read(data: bytes) -> bytes:
    """A PNG file that `_measure_png` has taken, without the chunks that make no pixels."""
    parts, start, seen = [], 0, set[bytes]()
    for kind, begin, end in _png_chunks(data):
        if kind not in _PNG_READ or kind in seen:
            parts.append(data[start:begin])
            start = end
        elif kind in _PNG_ONCE:
            seen.add(kind)
    return b"".join([*parts, data[start:]]) if parts else data


def _measure_webp(data: bytes) -> Header:
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise InvalidImage("is a WebP file that ends early")
    kind = data[12:16]
    if kind == b"VP8X":
        _check_webp_chunks(data, length + 8)
        return Header("WebP", _three_bytes(data, 24) + 1, _three_bytes(data, 27) + 1)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("WebP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WebP", width & 0x3FFF, height & 0x3FFF)
    raise InvalidImage("is a WebP file of an unknown kind")


def _check_webp_chunks(data: bytes, end: int) -> None:
    position = 12
    for _ in range(_WEBP_CHUNKS):
        if position + 8 > end:
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            _check_exif("WebP", length)
        position += 8 + length + length % 2
    raise InvalidImage(f"is a WebP file of more than {_WEBP_CHUNKS:,} chunks")


def _with_bare_exif(data: bytes) -> bytes:
    """A WebP file without the six bytes before its EXIF that a JPEG has: libvips (so sharp, too) and Pillow before 9.3 write
    them, and OpenCV finds no orientation behind them."""
    (riff,) = struct.unpack_from("<I", data, 4)
    position = 12 if data[12:16] == b"VP8X" else len(data)
    while position + 8 <= riff + 8:  # `_check_webp_chunks` has counted them
        kind, length = struct.unpack_from("<4sI", data, position)
        begin, position = position + 8, position + 8 + length + length % 2
        if kind == b"EXIF":
            if length < 6 or not data.startswith(b"Exif\0\0", begin):
                break
            return data[:begin] + data[begin + 6 : begin + length] + bytes(6) + data[begin + length :]
    return data


def _check_exif(format_: str, length: int) -> None:
    if length > _EXIF_BYTES:
        raise InvalidImage(f"is a {format_} file with {length:,} bytes of EXIF; at most {_EXIF_BYTES:,} are taken")


def _three_bytes(data: bytes, position: int) -> int:
    return data[position] | data[position + 1] << 8 | data[position + 2] << 16


def _measure_bmp(data: bytes) -> Header:
    (start, header) = struct.unpack_from("<II", data, 10)
    if header not in _BMP_HEADERS:
        raise InvalidImage("is not a BMP file, though it begins like one")
    if header == 12:
        width, height, _, depth = struct.unpack_from("<HHHH", data, 18)
        packed = 0
    else:
        width, height, _, depth, packed = struct.unpack_from("<iiHHI", data, 18)
    if (packed, depth) == (3, 32) and struct.unpack_from("<III", data, 54) != _BMP_MASKS:
        raise InvalidImage("is a BMP file whose colours lie in an order that is not read")
    height = abs(height)  # negative: rows from the top
    row = (width * depth + 31) // 32 * 4
    if packed in (0, 3, 6) and start + row * height > len(data):
        raise InvalidImage("is a BMP file that ends early")
    return Header("BMP", width, height)


def _measure_tiff(data: bytes) -> Header:
    numbers, parts = _tiff_directory(data)
    page, width, height, compression, colours, apart = numbers.values()
    if page & 1:
        raise InvalidImage("is a TIFF file that begins with a thumbnail, as cameras' raw files do; send its JPEG")
    if colours == _TIFF_CIELAB:
        raise InvalidImage("is a TIFF file in CIELab, which is not read")
    if compression not in _TIFF_COMPRESSIONS:
        raise InvalidImage(f"is a TIFF file of compression {compression}, which is not read; save it with LZW or none")
    begins, lengths = (parts.get(tag, np.empty(0)) for tag in (273, 279))
    if lengths.sum() > 2 * len(data):
        raise InvalidImage("is a TIFF file whose parts are longer than itself")
    if apart == 2 and len(begins) == len(lengths) and (begins + lengths > len(data)).any():
        raise InvalidImage("is a TIFF file that ends early")  # OpenCV would read the colours that are there
    return Header("TIFF", width, height)


def _tiff_directory(data: bytes) -> tuple[dict[int, int], dict[int, npt.NDArray[np.float64]]]:
    """Of the first page the numbers of `_TIFF_NUMBERS`, and where its strips begin and how long they are, by tag."""
    order = "<" if data[:2] == b"II" else ">"
    (position,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, position)
    numbers, parts, seen = _TIFF_NUMBERS.copy(), dict[int, npt.NDArray[np.float64]](), set[int]()
    values = 0  # bytes of all entries' values, which a decoder would read
    for here in range(position + 2, position + 2 + 12 * count, 12):
        tag, kind, number, place = struct.unpack_from(order + "HHII", data, here)
        values += number * _TIFF_VALUE_BYTES.get(kind, 0)
        if values > len(data):
            raise InvalidImage("is a TIFF file whose parts are longer than itself")
        if tag in seen:
            raise InvalidImage(f"is a TIFF file with tag {tag} twice")  # a decoder might take the other
        if tag in numbers:
            if kind not in (3, 4) or number != 1:
                raise InvalidImage(f"is a TIFF file whose tag {tag} is not one number")
            (numbers[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, here + 8)
            seen.add(tag)
        elif tag in _TIFF_TILES:
            raise InvalidImage("is a TIFF file in tiles, which is not read; save it in strips")
        elif tag in (273, 279):
            if number > _TIFF_STRIPS:
                raise InvalidImage(f"is a TIFF file of more than {_TIFF_STRIPS:,} strips")
            if kind in _TIFF_LENGTHS:
                start = here + 8 if number * _TIFF_VALUE_BYTES[kind] <= 4 else place
                parts[tag] = np.frombuffer(data, order + _TIFF_LENGTHS[kind], number, start).astype(np.float64)
            seen.add(tag)
    _check_pages(data, order, position + 2 + 12 * count)
    return numbers, parts


def _check_pages(data: bytes, order: str, end: int) -> None:
    """Follow the pages of a TIFF behind its first directory's end. OpenCV counts them, and keeps the place of each."""
    with contextlib.suppress(struct.error):  # where a decoder stops, too
        for _ in range(_TIFF_PAGES):
            (position,) = struct.unpack_from(order + "I", data, end)
            (count,) = struct.unpack_from(order + "H", data, position)
            if position == 0:
                return
            end = position + 2 + 12 * count
        raise InvalidImage(f"is a TIFF file of more than {_TIFF_PAGES:,} pages")


_READERS: tuple[tuple[bytes, str, Callable[[bytes], Header]], ...] = (
    (b"\xff\xd8\xff", "JPEG", _measure_jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _measure_png),
    (b"RIFF", "WebP", _measure_webp),
    (b"BM", "BMP", _measure_bmp),
    (b"II*\x00", "TIFF", _measure_tiff),
    (b"MM\x00*", "TIFF", _measure_tiff),
)

_UNREAD = (  # where, what and whose
    (0, b"GIF8", "GIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")),
    *((4, b"ftyp" + brand, "HEIC or AVIF") for brand in (b"mif1", b"msf1")),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    *((0, magic, "BigTIFF") for magic in (b"II+\0", b"MM\0+")),
)
