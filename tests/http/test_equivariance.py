"""What moves the picture moves the keypoints: shifts, mirrors, turns by EXIF."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

X, Y, W, H = BOX = (295, 15, 545, 595)
LEFT_RIGHT = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
SURE = 0.5  # score of the joints that are compared; the others lie where nothing holds them


@pytest.fixture(scope="module")
def pixels(t_pose) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)


def joints(client, pixels: np.ndarray | bytes, box: tuple[float, ...], **options: object) -> np.ndarray:
    """Places and scores [17, 3]."""
    data = pixels if isinstance(pixels, bytes) else cv2.imencode(".png", pixels)[1].tobytes()
    answer = client.post(
        "/v1/pose",
        params={"boxes": ",".join(map(str, box)), "format": "results"} | options,
        content=data,
        headers={"Content-Type": "image/png"},
    )
    (person,) = answer.raise_for_status().json()
    return np.reshape(person["keypoints"], (17, 3))


def test_a_shifted_picture_shifts_the_keypoints(client, pixels):
    before = joints(client, pixels, BOX)
    shifted = cv2.copyMakeBorder(pixels, 37, 0, 53, 0, cv2.BORDER_CONSTANT)
    after = joints(client, shifted, (X + 53, Y + 37, W, H))
    assert np.abs(after[:, :2] - before[:, :2] - [53, 37]).max() < 0.5
    assert np.abs(after[:, 2] - before[:, 2]).max() < 0.02


def test_a_mirrored_picture_mirrors_the_keypoints_of_a_flip_test(client, pixels):
    width = pixels.shape[1]
    before = joints(client, pixels, BOX, flip_test=True)
    after = joints(client, pixels[:, ::-1].copy(), (width - X - W, Y, W, H), flip_test=True)[LEFT_RIGHT]
    sure = before[:, 2] > SURE
    assert sure.sum() >= 8
    expected = np.stack([width - 1 - before[:, 0], before[:, 1]], axis=1)
    cell = W * 1.25 / 48
    assert np.abs(after[sure, :2] - expected[sure]).max() < cell / 4


def test_a_larger_picture_enlarges_the_keypoints(client, pixels):
    before = joints(client, pixels, BOX)
    after = joints(client, cv2.resize(pixels, None, fx=1.5, fy=1.5), tuple(1.5 * v for v in BOX))
    sure = before[:, 2] > SURE
    assert np.abs(after[sure, :2] / 1.5 - before[sure, :2]).max() < W * 1.25 / 48


@pytest.mark.parametrize("sides", [(4320, 2880), (4319, 2879)])  # decoded eight times smaller, and whole
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photo_has_the_keypoints_of_the_small_one(client, pixels, sides, orientation):
    large = Image.fromarray(cv2.resize(pixels, None, fx=4, fy=4)[: sides[1], : sides[0], ::-1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    with io.BytesIO() as file:
        stored = large.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else large
        stored.save(file, "JPEG", exif=exif, quality=95)
        after = joints(client, file.getvalue(), (4 * X + 1.5, 4 * Y + 1.5, 4 * W, 4 * H))
    before = joints(client, pixels, BOX)
    sure = before[:, 2] > SURE
    apart = (after[sure, :2] - 1.5) / 4 - before[sure, :2]
    assert np.abs(np.median(apart, axis=0)).max() < 0.5  # a picture that is off by half of eight pixels is off by more
    assert np.abs(apart).max() < W * 1.25 / 48


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_picture_turned_by_exif_is_the_same_picture(client, pixels, orientation):
    upright = Image.fromarray(pixels[..., ::-1])
    # What a camera stores so that the orientation turns it upright.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    with io.BytesIO() as file:
        upright.transpose(stored).save(file, "PNG", exif=exif)
        after = joints(client, file.getvalue(), BOX)
    assert (after == joints(client, pixels, BOX)).all()
