"""Picture files: upright to the pixel as Pillow reads them, never half of one, and judged by the header alone."""

import contextlib
import io
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from app.inference.pictures import is_heavy
from app.vision import image
from app.vision.image import ImageTooLarge, InvalidImage

WIDTH, HEIGHT = 47, 31
MOST = 50_000_000

Y, X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([X * 5, Y * 8, (3 * X + 4 * Y) % 256], axis=2).astype(np.uint8)
RGB[2:9, 3:15] = (250, 10, 20)
PICTURE = Image.fromarray(RGB)
OTHER = Image.fromarray(255 - RGB)
SEE_THROUGH = PICTURE.copy()
SEE_THROUGH.putalpha(Image.fromarray((X * Y % 256).astype(np.uint8)))


def file(picture: Image.Image, format_: str, **options: object) -> bytes:
    """A picture file as Pillow writes it, without loss where the format allows."""
    best = {"WebP": {"lossless": True, "exact": True}, "JPEG": {"quality": 95}}.get(format_, {})
    with io.BytesIO() as out:
        picture.save(out, format_, **best | options)
        return out.getvalue()


def as_pillow_reads(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[..., ::-1]


def assert_reads(data: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    found = image.decode(data, MOST)
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance


FORMATS = ["JPEG", "PNG", "WebP", "BMP", "TIFF"]
MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"]
WRITES = {"JPEG": {"RGB", "L", "1", "CMYK"}, "PNG": set(MODES) - {"CMYK"}, "WebP": set(MODES), "TIFF": set(MODES) - {"RGBA"}}
WRITES["BMP"] = {"RGB", "L", "1", "P", "RGBA"}


@pytest.mark.parametrize(("format_", "mode"), [(f, m) for f in FORMATS for m in MODES if m in WRITES[f]])
def test_every_mode_is_read_as_pillow_reads_it(format_, mode):
    picture = SEE_THROUGH.convert(mode) if mode.endswith("A") else PICTURE.convert(mode)
    data = file(picture, format_)
    assert_reads(data, as_pillow_reads(data), tolerance=1 if format_ == "JPEG" else 0)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WebP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_the_pixel(format_, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = file(PICTURE, format_, **{"tiffinfo": {0x112: orientation}} if format_ == "TIFF" else {"exif": exif})
    expected = as_pillow_reads(data)
    assert expected.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    assert_reads(data, expected)


def test_sixteen_bits_become_eight():
    grey = (X * 1200 + Y * 300).astype(np.uint16)
    colour = np.stack([grey, grey // 2, 65_535 - grey], axis=2)
    for extension in (".png", ".tiff"):
        for pixels in (grey, colour, np.dstack([colour, grey])):
            eight = (pixels >> 8).astype(np.uint8)
            expected = np.repeat(eight[..., None], 3, axis=2) if eight.ndim == 2 else eight[..., :3]
            assert_reads(cv2.imencode(extension, pixels)[1].tobytes(), expected, tolerance=1)


def test_a_picture_for_which_there_is_no_memory_is_not_called_damaged(tmp_path):
    (tmp_path / "large.png").write_bytes(cv2.imencode(".png", np.zeros((6000, 8000, 3), np.uint8))[1].tobytes())
    script = (
        "import resource, sys; from pathlib import Path; from app.vision import image; data = Path(sys.argv[1]).read_bytes();"
        "pages = int(Path('/proc/self/statm').read_text().split()[0]);"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 50_000_000,) * 2);"
        "image.decode(data, 50_000_000)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "large.png")], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("MemoryError")


def test_cmyk_is_read_with_and_without_adobes_marker():
    data = file(PICTURE.convert("CMYK"), "JPEG", quality=100)
    adobe = data.index(b"\xff\xee")
    length = struct.unpack_from(">H", data, adobe + 2)[0]
    assert data[adobe + 4 : adobe + 9] == b"Adobe"
    without = data[:adobe] + data[adobe + 2 + length :]
    ycck = data[: adobe + 15] + b"\x02" + data[adobe + 16 :]
    for variant in (data, without, ycck):
        assert_reads(variant, as_pillow_reads(variant), tolerance=2)
    assert_reads(data, np.asarray(PICTURE)[..., ::-1], tolerance=12)


def test_a_palette_with_transparency_keeps_its_colours():
    palette = PICTURE.quantize(16)
    for data in (file(palette, "PNG", transparency=3), file(palette, "PNG", bits=4), file(palette, "BMP")):
        assert_reads(data, as_pillow_reads(data))


def test_a_tiffs_alpha_is_blended_onto_black():
    solid = PICTURE.convert("RGBA")
    assert_reads(file(solid, "TIFF"), RGB[..., ::-1])
    alpha = np.asarray(SEE_THROUGH)[..., 3:].astype(float) / 255
    assert_reads(file(SEE_THROUGH, "TIFF"), (RGB * alpha)[..., ::-1], tolerance=1)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs_are_read(compression):
    data = file(PICTURE, "TIFF", compression=compression)
    assert_reads(data, as_pillow_reads(data), tolerance=2)


@pytest.mark.parametrize(("compression", "number"), [("jpeg", 7), ("group3", 3), ("group4", 4)])
def test_a_tiff_that_holds_a_jpeg_or_a_fax_is_refused(compression, number):
    """A JPEG within may have 65,500 rows, whatever the TIFF has: 274 bytes took 4 GB."""
    data = file(PICTURE if compression == "jpeg" else PICTURE.convert("1"), "TIFF", compression=compression)
    with pytest.raises(InvalidImage, match=f"of compression {number}, which is not read; save it with LZW or none"):
        image.read_header(data)


def test_a_progressive_jpeg_is_read():
    data = file(PICTURE, "JPEG", progressive=True)
    assert_reads(data, as_pillow_reads(data))


@pytest.mark.parametrize(("format_", "picture"), [(f, p) for f in ("PNG", "WebP", "TIFF") for p in (PICTURE, SEE_THROUGH)])
def test_the_first_frame_of_an_animation_counts(format_, picture):
    if format_ == "TIFF":
        picture = picture.convert("RGB")
    data = file(picture, format_, save_all=True, append_images=[OTHER.convert(picture.mode)] * 2)
    assert_reads(data, as_pillow_reads(data))


@pytest.mark.parametrize("format_", FORMATS)
def test_one_pixel_is_a_picture(format_):
    data = file(Image.new("RGB", (1, 1), (10, 20, 30)), format_)
    assert_reads(data, as_pillow_reads(data))


@pytest.mark.parametrize("format_", FORMATS)
def test_bytes_after_a_pictures_end_are_ignored(format_):
    data = file(PICTURE, format_)
    assert_reads(data + b"\0 and more", as_pillow_reads(data))


# Files that end early

FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: file(PICTURE, "JPEG"),
    "progressive JPEG": lambda: file(PICTURE, "JPEG", progressive=True),
    "JPEG with restarts": lambda: file(PICTURE, "JPEG", restart_marker_blocks=1),
    "CMYK JPEG": lambda: file(PICTURE.convert("CMYK"), "JPEG"),
    "PNG": lambda: file(PICTURE, "PNG"),
    "animated PNG": lambda: file(PICTURE, "PNG", save_all=True, append_images=[OTHER]),
    "WebP": lambda: file(PICTURE, "WebP", lossless=False),
    "lossless WebP": lambda: file(PICTURE, "WebP"),
    "WebP with alpha": lambda: file(SEE_THROUGH, "WebP", lossless=False),
    "animated WebP": lambda: file(PICTURE, "WebP", save_all=True, append_images=[OTHER]),
    "BMP": lambda: file(PICTURE, "BMP"),
    "palette BMP": lambda: file(PICTURE.quantize(16), "BMP"),
    "TIFF": lambda: file(PICTURE, "TIFF"),
    "LZW TIFF": lambda: file(PICTURE, "TIFF", compression="tiff_lzw"),
    "deflate TIFF": lambda: file(PICTURE, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF with its directory last": cv2.imencode(".tiff", RGB)[1].tobytes,
}


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused_at_every_length(kind):
    data = FILES[kind]()
    image.decode(data, MOST)
    for length in range(0, len(data), max(1, len(data) // 400)):
        with pytest.raises(InvalidImage):
            image.decode(data[:length], MOST)


def test_a_photo_cut_off_anywhere_is_refused(two_women):
    for length in range(0, len(two_women), 997):
        with pytest.raises(InvalidImage):
            image.read_header(two_women[:length])
    assert image.read_header(two_women) == image.Header("JPEG", 1280, 845, exif=False)


def test_a_cut_off_photo_with_a_whole_one_behind_it_is_refused(two_women):
    with pytest.raises(InvalidImage):
        image.decode(two_women[: len(two_women) // 2] + two_women, MOST)


def test_a_thumbnail_is_not_taken_for_the_picture():
    exif = Image.Exif()
    exif[0x9286] = b"ASCII\0\0\0" + file(PICTURE.resize((8, 8)), "JPEG")
    data = file(PICTURE, "JPEG", exif=exif)
    assert image.read_header(data) == image.Header("JPEG", WIDTH, HEIGHT)
    with pytest.raises(InvalidImage):
        image.decode(data[:-300], MOST)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8)
)
def test_damaged_files_are_read_or_refused_and_nothing_else(kind, changes):
    data = bytearray(FILES[kind]())
    for place, byte in changes:
        data[int(place * len(data))] = byte
    try:
        picture = image.decode(bytes(data), 1_000_000)
    except (InvalidImage, ImageTooLarge):
        return
    assert picture.ndim == 3
    assert picture.shape[0] * picture.shape[1] <= 1_000_000


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x1c\0\0\0WEBPVP8X", b"BM", b"II*\0", b"MM\0*"]),
    st.binary(max_size=200),
)
def test_any_bytes_are_read_or_refused_and_nothing_else(start, rest):
    with contextlib.suppress(InvalidImage, ImageTooLarge):
        image.decode(start + rest, 1_000_000)


# Headers


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes = b"\0", parts: int = 1, colours: int = 0, interlaced: int = 0) -> bytes:
    """A PNG of 8 bits whose packed content is in so many chunks."""
    header, packed = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, interlaced), zlib.compress(content, 9)
    size = len(packed) // parts + 1
    chunks = [chunk(b"IDAT", packed[at : at + size]) for at in range(0, len(packed), size)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(file(PICTURE, "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def bmp(width: int, height: int, depth: int = 8, packed: int = 1, header: int = 40) -> bytes:
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, depth, packed, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 2000, 0, 0, 14 + 40 + 1024) + head + bytes(1024) + b"\0\1"


def webp(width: int, height: int) -> bytes:
    """A still lossless picture in an extended file whose canvas is of another size."""
    exif = Image.Exif()
    exif[0x112] = 1
    data = bytearray(file(PICTURE, "WebP", exif=exif))
    assert data[12:16] == b"VP8X"
    data[24:27], data[27:30] = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    return bytes(data)


def tiff(*tags: tuple[int, int, int], order: str = "<", body: bytes = bytes(300)) -> bytes:
    """A TIFF of 20 × 10 grey pixels; (tag, kind, value) replace or add to its directory."""
    usual = {256: (4, 20), 257: (4, 10), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1), 278: (4, 10), 279: (4, 200)}
    entries = usual | {tag: (kind, value) for tag, kind, value in tags}
    start = 10 + 12 * (len(entries) + 1) + 4
    entries.setdefault(273, (4, start))
    packed = b"".join(
        struct.pack(order + "HHI", tag, kind, 1)
        + (struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value))
        for tag, (kind, value) in sorted(entries.items())
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IH", 8, len(entries)) + packed + bytes(4) + body


@pytest.mark.parametrize(
    "bomb",
    [
        png(20_000, 20_000, bytes(10**7)),
        png(2**32 - 1, 2**32 - 1),
        jpeg(65_500, 65_500),
        bmp(20_000, 20_000),
        bmp(2**31 - 1, -(2**31)),
        webp(16_383, 16_383),
        webp(16_000_000, 2),
        tiff((256, 4, 20_000), (257, 4, 20_000)),
        tiff((256, 4, 2**32 - 1), (257, 4, 2**32 - 1)),
        png(32_767, 1),
    ],
    ids=lambda data: str(len(data)),
)
def test_a_bomb_is_refused_at_once_by_its_header(bomb):
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ImageTooLarge, match=r"50,000,000"):
        image.decode(bomb, MOST)
    assert time.perf_counter() - started < 0.5
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


# Small files that are long work


def test_a_jpeg_of_very_many_scans_is_refused_at_once():
    """A scan of 26 bytes costs a pass over all pixels: 32 MB of them would be hours."""
    data = file(Image.new("RGB", (3000, 2000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert image.decode(data[:-2] + 50 * last + b"\xff\xd9", MOST).shape == (2000, 3000, 3)
    started = time.perf_counter()
    with pytest.raises(InvalidImage, match="more than 100 scans"):
        image.decode(data[:-2] + 100_000 * last + b"\xff\xd9", MOST)
    assert time.perf_counter() - started < 0.5


def test_a_jpegs_scans_are_counted_behind_a_marker_that_libjpeg_passes_over():
    """Where it expects a restart it takes no length behind FF02, and decodes the scans in what that is said to hold."""
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
    data = cv2.imencode(".jpg", np.zeros((64, 64), np.uint8), options)[1].tobytes()
    begin = data.index(b"\xff\xda")
    scan = data[begin : begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")]
    hidden = b"\xff\x02" + (2 + 200 * len(scan)).to_bytes(2, "big") + 200 * scan
    with pytest.raises(InvalidImage, match="more than 100 scans"):
        image.read_header(data[: begin + len(scan)] + hidden + data[begin + len(scan) :])


def test_a_jpeg_whose_scans_are_large_together_is_refused():
    data = file(Image.new("L", (300, 200)), "JPEG", progressive=True)
    last, scans = data[data.rindex(b"\xff\xda") : -2], data.count(b"\xff\xda")
    assert image.decode(data[:-2] + (20 - scans) * last + b"\xff\xd9", 60_000).shape == (200, 300, 3)
    with pytest.raises(InvalidImage, match="21 scans have over 1,200,000 pixels together"):
        image.decode(data[:-2] + (21 - scans) * last + b"\xff\xd9", 60_000)
    with pytest.raises(ImageTooLarge):
        image.decode(data[:-2] + (21 - scans) * last + b"\xff\xd9", 59_999)


@pytest.mark.parametrize(("marker", "told"), [(0xC9, "with arithmetic coding"), (0xC3, "in lossless coding")])
def test_a_jpeg_in_a_coding_that_is_not_read_is_refused(marker, told):
    data = bytearray(file(PICTURE, "JPEG"))
    data[data.index(b"\xff\xc0") + 1] = marker
    with pytest.raises(InvalidImage, match=told):
        image.read_header(bytes(data))


def exif(entries: int, size: int) -> bytes:
    """A block whose entries all name the same text."""
    head = b"II*\0" + struct.pack("<IH", 8, entries) + struct.pack("<HHII", 0x010E, 2, size - 8, 8) * entries
    return head + bytes(size - len(head))


def with_exif(format_: str, block: bytes, times: int = 1) -> bytes:
    if format_ == "PNG":
        data = file(PICTURE, "PNG")
        return data[:33] + times * chunk(b"eXIf", block) + data[33:]
    if format_ == "WebP":
        return file(PICTURE, "WebP", lossless=True, exif=block)
    data, content = file(PICTURE, "JPEG"), b"Exif\0\0" + block
    return data[:2] + times * (b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content) + data[2:]


@pytest.mark.parametrize("format_", ["PNG", "WebP"])
def test_exif_longer_than_a_jpegs_is_refused(format_):
    """A decoder copies the text once for each entry: 8 MB of 65,535 entries would be minutes."""
    assert image.decode(with_exif(format_, exif(1000, 65_535)), MOST).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(InvalidImage, match="with 65,536 bytes of EXIF; at most 65,535 are taken"):
        image.decode(with_exif(format_, exif(1000, 65_536)), MOST)


def test_a_jpeg_of_many_blocks_of_exif_is_refused():
    assert image.decode(with_exif("JPEG", exif(1, 100), 8), MOST).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(InvalidImage, match="more than 8 blocks of EXIF"):
        image.decode(with_exif("JPEG", exif(1, 100), 9), MOST)


def test_a_webp_of_very_many_chunks_is_refused_at_once():
    data = with_exif("WebP", exif(1, 100))
    many = data + 200_000 * (b"none" + bytes(4))
    started = time.perf_counter()
    with pytest.raises(InvalidImage, match="more than 100,000 chunks"):
        image.decode(many[:4] + struct.pack("<I", len(many) - 8) + many[8:], MOST)
    assert time.perf_counter() - started < 0.5


def test_a_tiff_whose_parts_are_long_work_is_refused():
    size = {256: (4, 1, 600), 257: (4, 1, 600), 259: (3, 1, 1)}
    with pytest.raises(InvalidImage, match="in CIELab"):
        image.read_header(tiff_of(size | {262: (3, 1, 8)}))
    for tag in (273, 279):
        assert image.read_header(tiff_of(size | {tag: (3, 200_000, 8)}, bytes(400_000))).width == 600
        with pytest.raises(InvalidImage, match="more than 200,000 strips"):
            image.read_header(tiff_of(size | {tag: (3, 200_001, 8)}, bytes(400_002)))


@pytest.mark.parametrize("chunks", [1, 50])
def test_a_png_with_more_data_than_pixels_is_refused_at_once(chunks):
    """libpng would inflate it to the end."""
    data = png(20, 10, bytes(300 * 2**20), chunks, colours=2)
    started = time.perf_counter()
    with pytest.raises(InvalidImage, match="more data than its pixels need"):
        image.decode(data, MOST)
    assert time.perf_counter() - started < 0.3


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (13, 9), (47, 31)])
def test_an_interlaced_png_is_read(width, height):
    """Whose seven passes hold more rows than the picture."""
    grey = (np.arange(width * height, dtype=np.uint32) * 7 % 256).astype(np.uint8).reshape(height, width)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [row.tobytes() for x, y, dx, dy in passes for row in grey[y::dy, x::dx] if row.size]
    data = png(width, height, b"".join(b"\0" + row for row in rows), interlaced=1)
    assert np.array_equal(image.decode(data, MOST)[..., 0], grey)


def test_a_bitmap_with_the_oldest_header_is_read():
    rows = b"".join(bytes((x, y, 200)) for y in range(3) for x in range(4))
    data = b"BM" + struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, 4, 3, 1, 24) + rows
    assert image.read_header(data) == image.Header("BMP", 4, 3)
    assert image.decode(data, MOST)[2, 1].tolist() == [1, 0, 200]
    with pytest.raises(InvalidImage, match="ends early"):
        image.decode(data[:-1], MOST)


def test_the_limit_is_the_number_of_pixels():
    data = file(PICTURE, "PNG")
    image.decode(data, WIDTH * HEIGHT)
    with pytest.raises(ImageTooLarge, match=r"47 × 31 = 1,457 pixels; at most 1,456"):
        image.decode(data, WIDTH * HEIGHT - 1)


@pytest.mark.parametrize(
    "data",
    [
        webp(10, 10),
        webp(6_000, 6_000),
        tiff((257, 4, 11)),
        tiff((279, 4, 10**9), (278, 4, 1)),
        tiff((273, 4, 2**31)),
        tiff((258, 3, 64)),
        tiff((258, 3, 3)),
        tiff((259, 3, 34_712)),
        tiff((259, 3, 50_000)),
        tiff((322, 4, 2**31 - 16), (323, 4, 2**31 - 16)),
        bmp(20, 10, depth=7, packed=0),
        bmp(-20, 10),
        bmp(20, 10, packed=99),
        bmp(20, 10, header=999),
        b"BM is how a text may begin, too, and then it goes on",
        jpeg(100, 0),
        png(0, 10),
    ],
    ids=lambda data: f"{data[:4]!r} {zlib.crc32(data)}",
)
def test_a_header_that_lies_is_refused(data):
    forget_peak_memory()
    before = peak_memory()
    with pytest.raises(InvalidImage):
        image.decode(data, MOST)
    assert peak_memory() < before + 20e6


@pytest.mark.parametrize("pages", [9_999, 10_001, -1])
def test_a_tiff_of_endless_pages_is_refused_early(pages):
    """OpenCV would follow a million empty ones, of six bytes each, and keep each one's place. One may lead to the first."""
    whole = file(PICTURE, "TIFF")
    (begin,) = struct.unpack_from("<I", whole, 4)
    (entries,) = struct.unpack_from("<H", whole, begin)
    end = begin + 2 + 12 * entries
    chain = np.zeros(abs(pages), np.dtype([("entries", "<u2"), ("next", "<u4")]))
    chain["next"][:-1] = len(whole) + 6 * np.arange(1, len(chain))
    chain["next"][-1] = 0 if pages > 0 else begin
    data = whole[:end] + struct.pack("<I", len(whole)) + whole[end + 4 :] + chain.tobytes()
    if pages == 9_999:
        assert_reads(data, as_pillow_reads(whole))
    else:
        with pytest.raises(InvalidImage, match="more than 10,000 pages"):
            image.read_header(data)


@pytest.mark.parametrize(
    ("picture", "options", "lossless"),
    [
        (PICTURE, {"lossless": False}, False),
        (PICTURE, {}, True),
        (SEE_THROUGH, {"lossless": False}, True),
        (PICTURE, {"save_all": True, "append_images": [PICTURE.rotate(90)]}, True),
    ],
)
def test_a_webp_is_known_whose_pixels_or_alpha_are_lossless(picture, options, lossless):
    assert is_heavy(file(picture, "WebP", **options)) == lossless


def peak_memory() -> int:
    """Bytes of memory that this process has had at most since `forget_peak_memory`."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def forget_peak_memory() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory are read from /proc")
    Path("/proc/self/clear_refs").write_text("5")


def test_both_byte_orders_of_tiff_are_read():
    for order in "<>":
        assert image.decode(tiff(order=order), MOST).shape == (10, 20, 3)


def test_other_formats_are_not_pictures():
    for format_ in ("ICO", "PPM", "TGA"):
        with pytest.raises(InvalidImage, match="is not a JPEG, PNG, WebP, BMP or TIFF file"):
            image.decode(file(PICTURE, format_), MOST)


@pytest.mark.parametrize(
    ("begin", "kind"), [(b"\0\0\0\x24ftypheic", "HEIC"), (b"\0\0\0\x20ftypavif", "AVIF"), (b"GIF89a", "GIF")]
)
def test_other_formats_of_photos_are_named(begin, kind):
    with pytest.raises(InvalidImage, match=f"^is a {kind} file, which is not read; send it as JPEG$"):
        image.read_header(begin + bytes(100))


def test_a_big_tiff_is_named():
    with pytest.raises(InvalidImage, match="BigTIFF"):
        image.read_header(file(PICTURE, "TIFF", big_tiff=True))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_webp_is_turned_by_exif_that_begins_as_in_a_jpeg(orientation):
    """As libvips and older versions of Pillow write it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    data = bytearray(file(PICTURE, "WebP", exif=exif))
    begin = data.index(b"EXIF")
    (length,) = struct.unpack_from("<I", data, begin + 4)
    assert data[begin + 8 : begin + 10] in (b"II", b"MM")  # if not, Pillow writes it so again
    expected = as_pillow_reads(bytes(data))
    data[begin + 4 : begin + 8] = struct.pack("<I", length + 6) + b"Exif\0\0"
    data[4:8] = struct.pack("<I", len(data) - 8)
    assert_reads(bytes(data), expected)


def test_a_thumbnail_is_not_taken_for_the_photo():
    """Most cameras' raw files are TIFFs that begin with one."""
    size = {256: (4, 1, 160), 257: (4, 1, 120)}
    assert image.read_header(tiff_of(size | {254: (4, 1, 2)})).width == 160
    with pytest.raises(InvalidImage, match="begins with a thumbnail"):
        image.read_header(tiff_of(size | {254: (4, 1, 1)}))


@pytest.mark.parametrize("tag", [322, 323, 324, 325])
def test_a_tiff_in_tiles_is_refused(tag):
    """OpenCV turns each tile for itself, and fills it to a rim that may lie thousands of pixels beyond the picture."""
    size = {256: (4, 1, 16), 257: (4, 1, 16), 259: (3, 1, 8)}
    with pytest.raises(InvalidImage, match="in tiles, which is not read; save it in strips"):
        image.read_header(tiff_of(size | {tag: (4, 1, 16)}))


def test_a_tiff_whose_colours_lie_apart_must_have_all_of_them():
    """OpenCV would read the planes that are there."""
    planes = b"".join(np.ascontiguousarray(RGB[..., colour]).tobytes() for colour in range(3))
    tags = {
        256: (4, 1, WIDTH),
        257: (4, 1, HEIGHT),
        258: (3, 3, 8),
        262: (3, 1, 2),
        273: (4, 3, 14),
        277: (3, 1, 3),
        279: (4, 3, 26),
    }
    size = WIDTH * HEIGHT
    places = [struct.pack("<III", *(end + 38 + plane * size for plane in range(3))) for end in (0, 1000)]
    told = struct.pack("<HHH", 8, 8, 8), struct.pack("<III", size, size, size)
    whole, cut = (tiff_of(tags | {284: (3, 1, 2)}, told[0] + place + told[1] + planes) for place in places)
    assert_reads(whole, RGB[..., ::-1])
    with pytest.raises(InvalidImage, match="ends early"):
        image.decode(cut, MOST)


def test_a_tiff_whose_strip_is_told_longer_than_it_is_is_read():
    """As some encoders write it; libtiff finds the length by itself."""
    tags = {256: (4, 1, WIDTH), 257: (4, 1, HEIGHT), 258: (3, 3, 8), 262: (3, 1, 2), 273: (4, 1, 14), 277: (3, 1, 3)}
    tags |= {279: (4, 1, RGB.nbytes + 1000)}
    assert_reads(tiff_of(tags, struct.pack("<HHH", 8, 8, 8) + RGB.tobytes()), RGB[..., ::-1])


def test_a_bmp_with_its_colours_in_another_order_is_refused():
    """OpenCV would not look at the order."""
    data = bytearray(cv2.imencode(".bmp", np.dstack([RGB, RGB[..., 0]]))[1].tobytes())
    (packed,) = struct.unpack_from("<I", data, 30)
    assert packed == 3
    assert image.decode(bytes(data), MOST).shape == (HEIGHT, WIDTH, 3)
    data[54:66] = struct.pack("<III", 0xFF, 0xFF00, 0xFF0000)
    with pytest.raises(InvalidImage, match="colours lie in an order"):
        image.decode(bytes(data), MOST)


@pytest.mark.parametrize(("most", "times"), [(0.2, 1), (1.9, 1), (2, 2), (3.9, 2), (4, 4), (8, 8), (float("inf"), 8)])
def test_a_large_jpeg_may_be_decoded_smaller(most, times):
    data = cv2.imencode(".jpg", np.zeros((30, 4001, 3), np.uint8))[1].tobytes()
    assert image.reduction(image.read_header(data), most) == times
    assert image.decode(data, 10**6, times).shape == (-(-30 // times), -(-4001 // times), 3)


def test_faulty_boxes_make_nothing_smaller():
    assert image.reduction(image.Header("JPEG", 4000, 3000), float("nan")) == 1


@pytest.mark.parametrize(
    ("width", "height", "times"),
    [(4032, 3024, 8), (4000, 2250, 2), (2004, 3008, 4), (3001, 2000, 1), (3000, 2001, 1), (648, 640, 8), (640, 640, 1)],
)
def test_for_crops_a_large_photo_that_may_be_turned_is_reduced_by_what_divides_both_sides(width, height, times):
    assert image.crop_reduction(image.Header("JPEG", width, height), 9) == times
    assert image.crop_reduction(image.Header("JPEG", width, height), 3) == min(times, 2)


@pytest.mark.parametrize(("width", "height", "times"), [(4001, 2667, 8), (641, 641, 8), (640, 640, 1), (639, 640, 1)])
def test_for_crops_a_large_photo_without_exif_is_reduced_whatever_its_sides(width, height, times):
    assert image.crop_reduction(image.Header("JPEG", width, height, exif=False), 9) == times
    assert image.crop_reduction(image.Header("JPEG", width, height, exif=False), 3) == min(times, 2)


def turned_by(data: bytes, orientation: int) -> bytes:
    """The JPEG file with an EXIF segment that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    segment = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    return data[:2] + struct.pack(">2sH", b"\xff\xe1", 2 + len(segment)) + segment + data[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_that_exif_turns_is_known_as_one_that_may_be(two_women, orientation):
    turned = turned_by(two_women, orientation)
    assert image.read_header(turned).exif
    width, height = (845, 1280) if orientation >= 5 else (1280, 845)
    assert image.decode(turned, MOST).shape == (height, width, 3)


@pytest.mark.parametrize(("orientation", "size"), [(None, (1280, 845)), (1, (1280, 845)), (6, (845, 1280)), (8, (845, 1280))])
def test_the_size_of_the_whole_upright_picture_is_known_from_a_smaller_one(two_women, orientation, size):
    data = two_women if orientation is None else turned_by(two_women, orientation)
    header = image.read_header(data)
    times = image.crop_reduction(header, 4)
    assert times == (4 if orientation is None else 1)
    assert image.upright_size(image.decode(data, MOST, times, header), header, times) == size


def test_other_formats_are_decoded_whole():
    data = cv2.imencode(".png", np.zeros((320, 4000, 3), np.uint8))[1].tobytes()
    assert image.reduction(image.read_header(data), 8) == image.crop_reduction(image.read_header(data), 8) == 1


def test_a_turned_jpeg_is_upright_when_decoded_smaller():
    turned = turned_by(cv2.imencode(".jpg", np.zeros((1000, 2000, 3), np.uint8))[1].tobytes(), 6)
    header = image.read_header(turned)
    picture = image.decode(turned, MOST, image.crop_reduction(header, 4))
    assert picture.shape == (500, 250, 3)
    assert image.upright_size(picture, header, 4) == (1000, 2000)


def test_a_png_without_its_header_first_is_refused():
    signature = b"\x89PNG\r\n\x1a\n"
    for chunks in (b"\0\0\0\0IEND\0\0\0\1\0\0\0\1", struct.pack(">I4sII", 12, b"IHDR", 5, 5) + bytes(20)):
        with pytest.raises(InvalidImage, match="does not begin with its header"):
            image.decode(signature + chunks, MOST)


def test_a_png_of_endless_empty_chunks_is_refused_early():
    whole = png(5, 5)
    data = whole[:33] + (bytes(4) + b"tEXt" + bytes(4)) * 100_000 + whole[33:]
    with pytest.raises(InvalidImage, match="more than 100,000 chunks"):
        image.read_header(data)


def test_a_jpeg_of_endless_empty_segments_is_refused_early():
    data = b"\xff\xd8" + b"\xff\xfe\0\2" * 5_001 + file(PICTURE, "JPEG")[2:]
    with pytest.raises(InvalidImage, match="more than 5,000 segments"):
        image.read_header(data)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("head", [b"zTXtx\0\0", b"iTXtx\0\1\0\0\0", b"iCCPx\0\0"])
@pytest.mark.parametrize("place", [33, -12])  # behind IHDR, before IEND
def test_compressed_texts_of_a_png_are_not_inflated(head, place, tmp_path):
    whole = file(PICTURE, "PNG")
    text = chunk(head[:4], head[4:] + zlib.compress(b"a" * 7_900_000, 9))
    data = whole[:place] + 40 * text + whole[place:]
    assert_reads(data, RGB[..., ::-1])
    (tmp_path / "bomb.png").write_bytes(data)
    look = (
        "import re, sys; from app.vision import image; data = open(sys.argv[1], 'rb').read()\n"
        "most = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = most(); image.decode(data, 10**6); print(most() - before)"
    )
    told = subprocess.run([sys.executable, "-c", look, tmp_path / "bomb.png"], capture_output=True, check=True, text=True)
    assert int(told.stdout) < 50_000  # kB, of 300,000


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"tEXt", b"gAMA", b"PLTE", b"zzZz"])
def test_the_decoder_sees_of_a_png_what_makes_its_pixels(kind, monkeypatch):
    """It would inflate each of many profiles that are too short, and tell of each chunk that it does not like."""
    whole, seen = file(PICTURE.convert("P"), "PNG"), []
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: seen.append(data.tobytes()) or decode(data, flags))
    end = whole.index(b"IDAT") - 4
    image.decode(whole[:end] + 60 * chunk(kind, b"x\0\0") + whole[end:], MOST)
    assert seen == [whole]


def test_nobody_writes_lines_of_a_log_with_a_png(capfd):
    whole = file(PICTURE, "PNG")
    forged = chunk(b"iCCP", b'\n{"level":"error"}\n\0\0' + zlib.compress(bytes(100)))
    odd = 50 * chunk(b"gAMA", struct.pack(">I", 45_455)) + 50 * chunk(b"tRNS", bytes(6))
    assert_reads(whole[:33] + forged + odd + whole[33:], RGB[..., ::-1])
    assert "level" not in (told := capfd.readouterr().err)
    assert told.count("\n") < 3


@pytest.mark.parametrize("tag", [254, 256, 257, 259, 262, 284])
def test_a_tiff_that_a_decoder_may_read_otherwise_is_refused(tag):
    """Which takes the first of two values for a tag, and for one of eight bytes what lies at a place."""
    tags = [
        (254, 4, 1, 0),
        (256, 3, 1, 16),
        (257, 3, 1, 16),
        (259, 3, 1, 8),
        (262, 3, 1, 2),
        (284, 3, 1, 1),
    ]

    def tiff(entries: list[tuple[int, ...]]) -> bytes:
        packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)

    assert image.read_header(tiff(tags)).width == 16
    others = [entry for entry in tags if entry[0] != tag]
    for odd in ([(tag, 4, 1, 10_000), (tag, 4, 1, 8)], [(tag, 16, 1, 8)], [(tag, 4, 2, 8)], [(tag, 1, 1, 8)]):
        with pytest.raises(InvalidImage, match=f"tag {tag} (is not one number|twice)"):
            image.read_header(tiff(sorted(others + odd, key=lambda entry: entry[0])))


def tiff_of(tags: dict[int, tuple[int, int, int]], behind: bytes = b"") -> bytes:
    """A little-endian TIFF: tag → type, number and value or place; `behind` begins at 8."""
    entries = b"".join(struct.pack("<HHII", tag, *told) for tag, told in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(behind)) + behind + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_whose_entries_share_bytes_is_refused_before_a_decoder_copies_them():
    size = {256: (4, 1, 8), 257: (4, 1, 8), 259: (3, 1, 8)}
    blob = bytes(100_000)
    assert image.read_header(tiff_of(size | {40_000: (1, len(blob), 8)}, blob)).width == 8
    for kind, number in ((1, 100_000), (2, 100_000), (7, 100_000), (12, 12_500)):
        with pytest.raises(InvalidImage, match="parts are longer than itself"):
            image.read_header(tiff_of(size | {40_000 + i: (kind, number, 8) for i in range(2)}, blob))


@pytest.mark.parametrize(("kind", "form"), [(3, "<u2"), (4, "<u4"), (8, "<u2"), (9, "<u4"), (16, "<u8"), (17, "<u8")])
def test_a_tiff_whose_strips_share_bytes_is_refused_before_a_decoder_reads_them_again_and_again(kind, form):
    size = {256: (4, 1, 1), 257: (4, 1, 500), 259: (3, 1, 8)}
    lengths = np.full(500, 50_000).astype(form).tobytes()
    with pytest.raises(InvalidImage, match="parts are longer than itself"):
        image.read_header(tiff_of(size | {279: (kind, 500, 8)}, lengths + bytes(60_000)))
    with pytest.raises(InvalidImage, match="ends early"):
        image.read_header(tiff_of(size | {279: (kind, 500, 70_000)}, lengths + bytes(60_000)))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_of_many_strips_is_read(compression):
    data = file(PICTURE, "TIFF", compression=compression, tiffinfo={278: 8, 40_000: "text " * 1000})
    with Image.open(io.BytesIO(data)) as written:
        assert len(written.tag_v2[279]) == 4
    assert_reads(data, as_pillow_reads(data), tolerance=2)
