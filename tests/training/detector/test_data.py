"""Cached photos and the pictures made of them: boxes stay on the people."""

import dataclasses
import json

import cv2
import numpy as np
import pytest

from training.detector.augment import PAD, Variation, augmented_batch
from training.detector.data import cached_photos, is_ignored

STILL = Variation(scale=(1.0, 1.0), mosaic=0.0, rotated=0.0, stretch=0.0, colour=False)


def _set(folder, boxes, photo=None, **more):
    photo = np.zeros((400, 800, 3), np.uint8) if photo is None else photo
    (folder / "a.png").write_bytes(cv2.imencode(".png", photo)[1].tobytes())
    images = [{"id": 1, "file_name": "a.png", "width": photo.shape[1], "height": photo.shape[0], **more}]
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, **box} for number, box in enumerate(boxes, 1)
    ]
    file = folder / "set.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def test_photos_are_reduced_with_their_boxes(tmp_path):
    file = _set(tmp_path, [{"bbox": [80, 40, 160, 200]}])
    photos = cached_photos(file, tmp_path / "cache", 400)
    assert photos[0].shape == (200, 400, 3)
    assert photos.labels(0)[0].tolist() == [[40, 20, 120, 120]]
    assert cached_photos(file, tmp_path / "cache", 400)[0].shape == (200, 400, 3)  # from disk


def test_a_photo_in_which_not_everyone_is_boxed_is_left_out(tmp_path):
    with pytest.raises(ValueError, match="no photo"):
        cached_photos(_set(tmp_path, [], persons_complete=False), tmp_path / "cache", 400)


@pytest.mark.parametrize(
    ("annotation", "ignored"),
    [
        ({"iscrowd": 0, "num_keypoints": 0}, False),
        ({"iscrowd": 1}, True),
        ({"iscrowd": 0, "iscrowd_unknown": True, "num_keypoints": 0}, True),
        ({"iscrowd": 0, "iscrowd_unknown": True, "num_keypoints": 5}, False),
    ],
)
def test_crowds_and_what_may_be_crowds_are_ignored(annotation, ignored):
    assert is_ignored(annotation) is ignored


def test_a_damaged_photo_is_named(tmp_path):
    file = _set(tmp_path, [])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"a\.png"):
        cached_photos(file, tmp_path / "cache", 400)


def test_a_mosaic_shows_what_the_batch_has_drawn(data, tmp_path):
    sets = [cached_photos(data / f"train/{name}.json", tmp_path, 416) for name in ("drawn", "nobody")]
    variation = Variation(scale=(1.0, 1.2), mosaic=1.0, rotated=0.0, colour=False)
    for step in range(6):
        batch = augmented_batch(sets, [(1, 0), (1, 1)], 192, 192, variation, np.random.default_rng(step))
        assert not sum(map(len, batch.people + batch.ignored))  # nobody of the other set


def test_boxes_stay_on_the_people(data, tmp_path):
    sets = [cached_photos(data / f"train/{name}.json", tmp_path, 416) for name in ("drawn", "nobody")]
    variation = Variation(scale=(0.5, 1.2), mosaic=0.5, rotated=0.0, colour=False)
    seen = 0
    for step in range(6):
        batch = augmented_batch(sets, [(0, 0), (0, 1), (1, 0)], 192, 192, variation, np.random.default_rng(step))
        for picture, people, ignored in zip(batch.pictures, batch.people, batch.ignored, strict=True):
            red = (picture[..., 2] > 180) & (picture[..., 0] < 70)
            for x1, y1, x2, y2 in people:
                inside = red[round(y1) + 1 : round(y2) - 1, round(x1) + 1 : round(x2) - 1]
                assert inside.mean() > 0.97
                seen += 1
            for x1, y1, x2, y2 in np.concatenate([people, ignored]):
                red[max(0, round(y1) - 2) : round(y2) + 2, max(0, round(x1) - 2) : round(x2) + 2] = False
            assert red.mean() < 0.001  # nobody is left without a box
    assert seen > 10


def test_a_turned_person_stays_in_the_box(tmp_path):
    photo = np.full((200, 200, 3), 255, np.uint8)
    cv2.ellipse(photo, (100, 100), (20, 60), 0, 0, 360, (0, 0, 0), -1)
    photos = cached_photos(_set(tmp_path, [{"bbox": [79.5, 39.5, 42, 122]}], photo), tmp_path / "cache", 200)
    turned = Variation(scale=(1.0, 1.0), mosaic=0.0, rotated=1.0, rotation=20.0, stretch=0.0, colour=False)
    for seed in range(4):
        batch = augmented_batch([photos], [(0, 0)], 200, 200, turned, np.random.default_rng(seed))
        rows, columns = np.nonzero((batch.pictures[0] < 60).all(2))
        hull = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(batch.people[0][0], hull, atol=3)


@pytest.mark.parametrize(
    "change", [{"scale": (0.5, 0.6)}, {"rotated": 1.0, "rotation": 20.0}, {"stretch": 0.5}, {"mosaic": 1.0}]
)
def test_each_variation_changes_the_box(tmp_path, change):
    photo = np.zeros((200, 400, 3), np.uint8)
    photo[20:180, 50:90] = 255
    photos = cached_photos(_set(tmp_path, [{"bbox": [50, 20, 40, 160]}], photo), tmp_path / "cache", 400)
    sizes = []
    for variation in (STILL, dataclasses.replace(STILL, **change)):
        pictures = augmented_batch([photos], [(0, 0)], 400, 400, variation, np.random.default_rng(1))
        corners = pictures.people[0][0]
        sizes.append(corners[2:] - corners[:2])
    assert np.abs(sizes[0] - sizes[1]).max() > 2


def test_people_who_are_tiny_or_cut_away_are_ignored(tmp_path):
    boxes = [{"bbox": [100, 100, 6, 7]}, {"bbox": [100, 100, 100, 100]}]
    photos = cached_photos(_set(tmp_path, boxes), tmp_path / "cache", 800)
    whole = augmented_batch([photos], [(0, 0)], 800, 800, STILL, np.random.default_rng(0))
    assert [len(whole.people[0]), len(whole.ignored[0])] == [1, 1]
    small = augmented_batch([photos], [(0, 0)], 64, 60, STILL, np.random.default_rng(0))
    assert [len(small.people[0]), len(small.ignored[0])] == [0, 2]


def test_the_same_seed_gives_the_same_pictures(data, tmp_path):
    photos = cached_photos(data / "train/drawn.json", tmp_path, 416)
    one, two = (
        augmented_batch([photos], [(0, 0), (0, 1)], 96, 96, Variation((0.5, 1.5)), np.random.default_rng(7)) for _ in range(2)
    )
    np.testing.assert_array_equal(one.pictures, two.pictures)
    np.testing.assert_array_equal(one.people[0], two.people[0])


def test_what_surrounds_a_photo_is_the_letterboxs_grey(data, tmp_path):
    photos = cached_photos(data / "train/nobody.json", tmp_path, 416)
    picture = augmented_batch([photos], [(0, 0)], 192, 96, STILL, np.random.default_rng(0)).pictures[0]
    assert (picture == PAD).all(2).mean() > 0.7
