"""Rendered people: keypoints project where they must, labels know what hides what, and the same seed gives the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.data import cached_people
from training.files import DataError
from training.keypoints import MIRROR
from training.synthetic.assets import load_assets
from training.synthetic.body import entangled, mirrored, pose, turned
from training.synthetic.labels import annotations
from training.synthetic.mesh import Material, box, joined
from training.synthetic.people import Regions, dressed
from training.synthetic.raster import rasterise
from training.synthetic.render import render
from training.synthetic.scene import Camera, Light, Scene

GREY = Material(np.full(3, 0.5, np.float32), np.full(3, 0.5, np.float32))
STILL = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])  # a camera that looks along -Z: right, down, forwards
CAMERA = Camera(np.array([0.0, 1.0, 5.0]), STILL, 300.0, np.array([127.5, 127.5]))
LIGHT = Light(np.array([0.0, 0.6, 0.8]), np.ones(3), 0.5)
RNG_WITHOUT_PATCH = 1  # a seed with which nothing is held before the camera
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def assets(assets_folder):
    return load_assets(assets_folder)


def scene(assets, number=0, things=(), mirror=False) -> Scene:
    """Pose `number` on the first body, where it stands at rest."""
    q = torch.tensor(assets.poses.q[[number]])
    posed = pose(assets.body, torch.zeros(1, 2), mirrored(q) if mirror else q)
    mesh = dressed(assets, Regions.of(assets.body), posed, 0, False, np.random.default_rng(0))
    return Scene(joined([mesh, *things]), posed.keypoints, posed.heights, CAMERA, LIGHT)


def seen_people(made: Scene, assets) -> tuple[np.ndarray, list[dict]]:
    nothing = np.zeros((256, 256, 3), np.float32)
    rng = np.random.default_rng(RNG_WITHOUT_PATCH)
    colours, seen = render(made, nothing.copy(), nothing, rng)
    return colours, annotations(made, seen, assets.body.slack, 1)


def joints(annotation: dict) -> np.ndarray:
    return np.array(annotation["keypoints"]).reshape(17, 3)


# Bodies


def test_the_rest_pose_leaves_the_body_as_it_is_and_shapes_move_it(assets):
    q = torch.tensor(assets.poses.q[[0, 0]])
    posed = pose(assets.body, torch.tensor([[0.0, 0.0], [0.1, 0.0]]), q)
    torch.testing.assert_close(posed.vertices[0], assets.body.mean, atol=1e-4, rtol=0)
    assert posed.heights.tolist() == pytest.approx([1.75, 1.1 * 1.75], abs=0.01)


def test_a_turned_limb_moves_what_hangs_on_it_and_nothing_else(assets):
    q = torch.tensor(assets.poses.q[[0]])
    q[0, 16] = torch.tensor([np.sqrt(0.5), 0, 0, np.sqrt(0.5)], dtype=torch.float32)  # the left arm by 90° about Z: upwards
    moved = pose(assets.body, torch.zeros(1, 2), q).keypoints[0] - assets.body.keypoints @ assets.body.mean
    left_arm = [5, 7, 9]
    assert (moved[left_arm, 1] > 0.2).all()
    assert moved[[joint for joint in range(17) if joint not in left_arm]].abs().max() < 1e-3


def test_yaw_turns_the_person_round(assets):
    q = turned(torch.tensor(assets.poses.q[[0]]), torch.tensor([np.pi], dtype=torch.float32))
    there = pose(assets.body, torch.zeros(1, 2), q).keypoints[0]
    here = pose(assets.body, torch.zeros(1, 2), torch.tensor(assets.poses.q[[0]])).keypoints[0]
    torch.testing.assert_close(there[:, 0], -here[:, 0], atol=1e-3, rtol=0)


def test_limbs_that_go_through_the_trunk_are_noticed():
    standing = torch.tensor([[0, 1.6, 0]] * 5 + [[x, y, 0] for y in (1.4, 1.2, 1.0, 0.9, 0.5, 0.1) for x in (0.2, -0.2)])
    through = standing.clone()
    through[9] = torch.tensor([-0.2, 1.1, 0.0])  # the left wrist on the right side, straight through
    found = entangled(torch.stack([standing, through]).float(), torch.tensor([1.7, 1.7]))
    assert found.tolist() == [False, True]


# Pictures


def test_the_nearest_triangle_is_seen_whatever_the_order_and_size():
    points = torch.tensor([[2.0, 2, 3], [60, 2, 3], [2, 60, 3], [10, 10, 2], [14, 10, 2], [10, 14, 2]])
    triangles = torch.tensor([[0, 1, 2], [3, 4, 5]])
    for order in ([0, 1], [1, 0]):
        numbers, depths = rasterise(points, triangles[order], torch.zeros(2, dtype=torch.int64), (1, 64, 64))
        assert numbers[0, 11, 11] == order.index(1)
        assert numbers[0, 20, 20] == order.index(0)
        assert numbers[0, 63, 63] == -1
        assert depths[0, 11, 11] == pytest.approx(2, abs=1e-3)
        assert torch.isinf(depths[0, 63, 63])


def test_triangles_of_several_pictures_do_not_mix():
    points = torch.tensor([[2.0, 2, 3], [60, 2, 3], [2, 60, 3]])
    numbers, _ = rasterise(points, torch.tensor([[0, 1, 2]]), torch.tensor([1]), (2, 64, 64))
    assert (numbers[0] == -1).all()
    assert numbers[1, 10, 10] == 0


def test_keypoints_project_where_they_must_and_the_persons_left_is_at_the_right(assets):
    _, (person,) = seen_people(scene(assets), assets)
    found = joints(person)
    wrist = CAMERA.project(torch.tensor([0.475, 1.4, 0.0]))  # the middle of the left arm's box
    assert found[9, :2].tolist() == pytest.approx([300 * 0.475 / 5 + 127.5, 127.5 - 300 * 0.4 / 5], abs=0.02)
    assert wrist[2] == 5
    assert found[9, 0] > found[10, 0]
    assert (found[:, 2] == 2).all()
    x, y, w, h = person["bbox"]
    assert (x, y) == pytest.approx((127.5 - 300 * 0.75 / 4.95, 127.5 - 300 * 0.75 / 4.9), abs=2)
    assert w == pytest.approx(300 * 1.5 / 4.95, abs=2)
    assert h == pytest.approx(300 * 1.75 / 4.95, abs=3)


def test_a_thing_in_front_hides_what_is_behind_it(assets):
    before = box(np.array([0.475, 1.4, 1.0]), np.array([0.4, 0.4, 0.1]), 0.0, GREY)
    _, (person,) = seen_people(scene(assets, things=[before]), assets)
    hidden = joints(person)[:, 2] == 1
    assert np.flatnonzero(hidden).tolist() == [5, 7, 9]
    behind = box(np.array([0.475, 1.4, -1.0]), np.array([0.4, 0.4, 0.1]), 0.0, GREY)
    _, (person,) = seen_people(scene(assets, things=[behind]), assets)
    assert (joints(person)[:, 2] == 2).all()


def test_joints_outside_of_the_picture_are_not_labelled(assets):
    close = Camera(np.array([0.475, 1.4, 1.5]), STILL, 300.0, np.array([127.5, 127.5]))
    made = scene(assets)
    made = Scene(made.mesh, made.keypoints, made.heights, close, LIGHT)
    _, (person,) = seen_people(made, assets)
    found = joints(person)
    assert person["num_keypoints"] == (found[:, 2] > 0).sum() < 17
    assert (found[found[:, 2] == 0] == 0).all()
    assert found[9, 2] == 2


def test_a_mirrored_scene_has_mirrored_labels(assets):
    assets.poses.q[0, 16] = [np.sqrt(0.5), 0, 0, np.sqrt(0.5)]  # one arm up, so that left differs from right
    _, (person,) = seen_people(scene(assets), assets)
    _, (other,) = seen_people(scene(assets, mirror=True), assets)
    assets.poses.q[0, 16] = [1, 0, 0, 0]
    expected = joints(person)[MIRROR]
    expected[:, 0] = 255 - expected[:, 0]
    np.testing.assert_allclose(joints(other), expected, atol=0.05)


# The command


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training.synthetic", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_a_set_that_training_reads_and_the_seed_decides(assets_folder, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done = run("--assets", assets_folder, "--count", 4, "--out", tmp_path / name, "--seed", seed)
        assert done.returncode == 0, done.stderr
        assert "4 of 4 pictures" in done.stderr
    for file in ("rendered.json", "rendered-0.zip"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a/rendered-0.zip").read_bytes() != (tmp_path / "c/rendered-0.zip").read_bytes()
    content = json.loads((tmp_path / "a/rendered.json").read_text())
    labelled = [person for person in content["annotations"] if person["num_keypoints"]]
    people = cached_people(tmp_path / "a/rendered.json", tmp_path / "cache", 128)
    assert len(people) == len(labelled) > 0
    for person in labelled:
        image = content["images"][person["image_id"]]
        shown = joints(person)[joints(person)[:, 2] > 0, :2]
        assert (shown >= -0.5).all()
        assert (shown <= [image["width"], image["height"]]).all()


def test_backgrounds_show_behind_people(assets_folder, tmp_path):
    photo = np.full((300, 300, 3), (0, 255, 0), np.uint8)
    cv2.imwrite(str(tmp_path / "green.png"), photo)
    image = {"id": 1, "file_name": "green.png", "width": 300, "height": 300}
    (tmp_path / "nobody.json").write_text(json.dumps({"images": [image], "annotations": []}))
    done = run("--assets", assets_folder, "--backgrounds", tmp_path / "nobody.json", "--count", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["poses.npz", "anny_compact.npz"])
def test_a_missing_or_broken_asset_is_named(assets_folder, tmp_path, name):
    for file in assets_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / name).read_bytes()
    for content in (b"nothing", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_assets(tmp_path)
    np.savez(tmp_path / name, other=np.zeros(1))
    with pytest.raises(DataError, match=name):
        load_assets(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be read: No such file"):
        load_assets(tmp_path)


def test_a_broken_archive_of_garments_is_named(assets_folder, tmp_path):
    for file in assets_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "makehuman_clothes_hair.tar.xz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"makehuman_clothes_hair\.tar\.xz is damaged"):
        load_assets(tmp_path)
