"""Pictures: the nearest is seen, keypoints project where they must, and labels know what hides what."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from training.detector.data import is_ignored
from training.files import DataError
from training.keypoints import MIRROR
from training.synthetic.backgrounds import Photo, background, read_photos
from training.synthetic.body import mirrored
from training.synthetic.camera import Camera, Light
from training.synthetic.garments import HAIR, load_garments
from training.synthetic.labels import annotations
from training.synthetic.mesh import Material, box
from training.synthetic.outfits import OF_HAIR, random_outfit
from training.synthetic.people import Regions
from training.synthetic.photo import Shot, photographs
from training.synthetic.raster import rasterise
from training.synthetic.render import NOBODY, render
from training.synthetic.scene import Cast, Scenes

GREY = Material([0.5, 0.5, 0.5])
STILL = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])  # a camera that looks along -Z: right, down, forwards
CAMERA = Camera(np.array([0.0, 1.0, 5.0]), STILL, 300.0, np.array([127.5, 127.5]))
LIGHT = Light(np.array([0.0, 0.6, 0.8]), np.ones(3), 0.5)
ONE_ARM_UP = [np.sqrt(0.5), 0, 0, np.sqrt(0.5)]
PLAIN_SHOT = Shot(1.0, 0.0, 1.0, 1.0, 0.0, 0, 0)


def scene(assets, *places, things=(), camera=CAMERA, q=None) -> Scenes:
    """A picture of 256 × 256 of people at rest at these places (x, y, z), one picture."""
    people = len(places) or 1
    q = torch.tensor(assets.poses.q[[0]]) if q is None else q
    outfits = [random_outfit(assets.garments, False, np.random.default_rng(0))] * people
    shift = torch.tensor(places or [(0.0, 0.0, 0.0)], dtype=torch.float32)
    cast = Cast(
        q.repeat(people, 1, 1),
        torch.zeros(people, 2),
        torch.zeros(people, 2),
        shift,
        torch.zeros(people, dtype=torch.int64),
        outfits,
    )
    return Scenes((256, 256), cast, [camera], [LIGHT], [(0, thing) for thing in things], [None])


def labelled(assets, made: Scenes) -> list[dict]:
    drawn = render(assets, Regions.of(assets.body), made)
    return annotations(drawn, assets.body.slack, 1)[0]


def joints(annotation: dict) -> np.ndarray:
    return np.array(annotation["keypoints"]).reshape(17, 3)


def test_the_nearest_triangle_is_seen_whatever_the_order_and_size():
    points = torch.tensor([[2.0, 2, 3], [60, 2, 3], [2, 60, 3], [10, 10, 2], [14, 10, 2], [10, 14, 2]])
    triangles = torch.tensor([[0, 1, 2], [3, 4, 5]])
    both, sheets = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    for order in ([0, 1], [1, 0]):
        numbers, depths = rasterise(points, triangles[order], both, (1, 64, 64), sheets)
        assert numbers[0, 11, 11] == order.index(1)
        assert numbers[0, 20, 20] == order.index(0)
        assert numbers[0, 63, 63] == -1
        assert depths[0, 11, 11] == pytest.approx(2, abs=1e-3)
        assert torch.isinf(depths[0, 63, 63])


def test_triangles_of_several_pictures_do_not_mix_and_backs_of_what_is_closed_are_left_out():
    points = torch.tensor([[2.0, 2, 3], [60, 2, 3], [2, 60, 3]])
    front, back, second = torch.tensor([[0, 2, 1]]), torch.tensor([[0, 1, 2]]), torch.tensor([1])
    for triangles, closed, seen in ((front, True, True), (back, True, False), (back, False, True)):
        numbers, _ = rasterise(points, triangles, second, (2, 64, 64), torch.tensor([closed]))
        assert (numbers[0] == -1).all()
        assert (numbers[1, 10, 10] == 0) == seen


def test_keypoints_project_where_they_must_and_the_persons_left_is_at_the_right(assets):
    (person,) = labelled(assets, scene(assets))
    found = joints(person)
    # The middle of the left arm's box is at (0.475, 1.4, 0), five metres from the camera.
    assert found[9, :2].tolist() == pytest.approx([300 * 0.475 / 5 + 127.5, 127.5 - 300 * 0.4 / 5], abs=0.02)
    assert found[9, 0] > found[10, 0]
    assert (found[:, 2] == 2).all()
    x, y, w, h = person["bbox"]
    assert (x, y) == pytest.approx((127.5 - 300 * 0.75 / 4.95, 127.5 - 300 * 0.75 / 4.9), abs=2)
    assert w == pytest.approx(300 * 1.5 / 4.95, abs=2)
    assert h == pytest.approx(300 * 1.75 / 4.95, abs=4)
    assert person["labels"] == "rendered"


def test_a_thing_in_front_hides_what_is_behind_it(assets):
    before, behind = (box(np.array([0.475, 1.4, z]), np.array([0.4, 0.4, 0.1]), 0.0, GREY) for z in (1.0, -1.0))
    (person,) = labelled(assets, scene(assets, things=[before]))
    assert np.flatnonzero(joints(person)[:, 2] == 1).tolist() == [5, 7, 9]
    assert [person["keypoint_weights"][joint] for joint in (5, 6, 7, 8, 9, 10)] == [0.5, 1, 0.5, 1, 0.5, 1]
    before_the_face = box(np.array([0.0, 1.65, 0.5]), np.array([0.3, 0.3, 0.1]), 0.0, GREY)
    (person,) = labelled(assets, scene(assets, things=[before_the_face]))
    assert person["keypoint_weights"] == [0.0] * 5 + [1.0] * 12
    (person,) = labelled(assets, scene(assets, things=[behind]))
    assert (joints(person)[:, 2] == 2).all()


def test_hair_hides_what_of_the_face_it_hangs_before_and_leaves_the_face_open(assets, assets_folder):
    (person,) = labelled(assets, scene(assets))
    number = next(number for number, each in enumerate(assets.garments) if each.kind == HAIR)
    assert (number, OF_HAIR) in scene(assets).cast.outfits[0].worn
    assert (joints(person)[:5, 2] == 2).all()
    body = assets.body
    garments = load_garments(assets_folder / "makehuman_clothes_hair.tar.xz", body.base_vertices, len(body.mean))
    assert len(garments[number].triangles) > len(assets.garments[number].triangles)  # all of it, with what was left out
    (person,) = labelled(replace(assets, garments=garments), scene(assets))
    assert (joints(person)[:5, 2] == 1).all()  # within the slack of the face, but it is hair that is seen
    assert (joints(person)[5:, 2] == 2).all()


def test_people_hide_each_other_even_where_they_touch(assets):
    first, second = labelled(assets, scene(assets, (0, 0, 0), (0, -0.5, 0.25)))
    body = [11, 12, 13, 14, 15, 16]
    assert (joints(first)[body, 2] == 1).all()  # within the slack of hips, but it is another's skin that is seen
    assert (joints(second)[:, 2] == 2).all()


def test_joints_outside_of_the_picture_are_not_labelled(assets):
    close = replace(CAMERA, place=np.array([0.475, 1.4, 1.5]))
    (person,) = labelled(assets, scene(assets, camera=close))
    found = joints(person)
    assert person["num_keypoints"] == (found[:, 2] > 0).sum() < 17
    assert (found[found[:, 2] == 0] == 0).all()
    assert found[9, 2] == 2


def test_who_is_as_good_as_hidden_has_a_box_but_no_keypoints(assets):
    wall = box(np.array([-0.6, 1.0, 1.0]), np.array([1.6, 3.0, 0.1]), 0.0, GREY)
    (person,) = labelled(assets, scene(assets, (-0.4, 0, 0), things=[wall]))
    assert person["num_keypoints"] == 0
    assert person["bbox"][2] > 0
    assert is_ignored(person)


def test_a_mirrored_scene_has_mirrored_labels(assets):
    q = torch.tensor(assets.poses.q[[0]])
    q[0, 16] = torch.tensor(ONE_ARM_UP)  # so that left differs from right
    (person,), (other,) = (labelled(assets, scene(assets, q=each)) for each in (q, mirrored(q)))
    expected = joints(person)[MIRROR]
    expected[:, 0] = 255 - expected[:, 0]
    np.testing.assert_allclose(joints(other), expected, atol=0.05)


def test_people_stand_before_the_background_and_held_things_before_them(assets):
    held = np.array([[0, 0], [255, 0], [255, 100], [0, 100]], np.int32)
    made = replace(scene(assets), held=[held])
    drawn = render(assets, Regions.of(assets.body), made)
    green, red = (np.full((128, 128, 3), colour, np.uint8) for colour in ((0, 255, 0), (0, 0, 255)))
    (picture,) = photographs(drawn, [green], [red], [PLAIN_SHOT])
    assert picture[20, 64].tolist() == [0, 0, 255]
    assert picture[120, 2].tolist() == [0, 255, 0]
    assert drawn.owner[0, 150, 133] == 0
    assert picture[75, 66].tolist() not in ([0, 255, 0], [0, 0, 255])
    (person,) = annotations(drawn, assets.body.slack, 1)[0]
    assert (joints(person)[:, 2] == np.where(joints(person)[:, 1] < 100, 1, 2)).all()
    assert (drawn.owner == NOBODY).any()


def test_a_shot_changes_the_picture(assets):
    drawn = render(assets, Regions.of(assets.body), scene(assets))
    grey = [np.full((128, 128, 3), 128, np.uint8)]
    (plain,) = photographs(drawn, grey, grey, [PLAIN_SHOT])
    for change in ({"reduction": 0.4}, {"blur": 1.2}, {"gamma": 1.3}, {"gain": 0.8}, {"noise": 0.03}, {"jpeg": 40}):
        (changed,) = photographs(drawn, grey, grey, [replace(PLAIN_SHOT, **change)])
        assert changed.shape == plain.shape
        assert 0.2 < np.abs(changed.astype(int) - plain).mean() < 60, change


def test_of_photos_with_people_the_parts_beside_them_are_taken():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 100:] = 255  # people
    photo = Photo(pixels, np.array([[100.0, 0, 200, 100]]))
    rng = np.random.default_rng(0)
    parts = [background([photo], 50, 40, rng) for _ in range(20)]
    beside = [part for part in parts if part.std() < 1]  # the others are gradients
    assert len(beside) > 10
    assert all((part == 0).all() for part in beside)


def test_photos_whose_people_may_not_all_be_boxed_are_no_backgrounds(tmp_path):
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((20, 30, 3), np.uint8))
    image = {"id": 1, "file_name": "1.png", "width": 30, "height": 20}
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}

    def photos(people: list[dict], **told: bool) -> int:
        (tmp_path / "a.json").write_text(json.dumps({"images": [image | told], "annotations": people}))
        return len(read_photos([tmp_path / "a.json"]))

    assert photos([]) == 1
    assert photos([person], persons_complete=True) == 1
    for people, told in (([person], {}), ([person], {"persons_complete": False}), ([], {"persons_complete": False})):
        with pytest.raises(DataError, match=r"a\.json holds no photo of nobody"):
            photos(people, **told)
