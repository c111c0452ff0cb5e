"""The trainer on a tiny set: it learns, it goes on where it stopped, and gives the same weights either way."""

import json
import zipfile

import cv2
import numpy as np
import pytest
import torch

from training.data import cached_people
from training.train import Config, epoch_order, heatmap_loss, main, target_heatmaps

CONFIG = """
seed = 3
depth = 50
[sets]
drawn = 1.5
[[stages]]
height = 64
crops = 16
batch = 4
learning_rate = 1e-3
sigma = 1.0
warm_up = 2
[[stages]]
height = 64
crops = 8
batch = 4
learning_rate = 1e-3
sigma = 1.0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six drawn people in the documented form: <name>.json beside a zip of pictures."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, name in (("train", "drawn"), ("dev", "coco")):
        (folder / part).mkdir()
        images, annotations = [], []
        with zipfile.ZipFile(folder / part / f"{name}-0.zip", "w") as archive:
            for number in range(1, 7):
                picture = rng.integers(0, 255, (120, 90, 3), np.uint8)
                joints = np.hstack([rng.uniform(5, 85, (17, 2)), np.full((17, 1), 2)])
                archive.writestr(f"{number}.png", cv2.imencode(".png", picture)[1].tobytes())
                images.append(
                    {"id": number, "file_name": f"{number}.png", "zip": f"{name}-0.zip", "width": 90, "height": 120}
                )
                annotations.append(
                    {"id": number, "image_id": number, "category_id": 1, "bbox": [5, 5, 80, 110], "area": 4000, "iscrowd": 0,
                     "num_keypoints": 17, "keypoints": joints.ravel().tolist()}
                )  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": []}
        (folder / part / f"{name}.json").write_text(json.dumps(content))
    return folder


def _run(data, tmp_path, monkeypatch, name, *more):
    (tmp_path / "config.toml").write_text(CONFIG)
    command = ["train", str(tmp_path / "config.toml"), "--data", str(data), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", [*command, "--run", str(tmp_path / name), *more])
    main()


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(data, tmp_path, monkeypatch):
    _run(data, tmp_path, monkeypatch, "whole")
    for _ in range(12):  # each call makes at least one step
        if (tmp_path / "parts/weights.pth").exists():
            break
        _run(data, tmp_path, monkeypatch, "parts", "--minutes", "0.0001")
    whole, parts = (torch.load(tmp_path / run / "weights.pth", weights_only=True) for run in ("whole", "parts"))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=0)
    assert (tmp_path / "parts/log.jsonl").read_text().count('"oks"') >= 6


def test_a_run_starts_from_given_weights(data, tmp_path, monkeypatch):
    _run(data, tmp_path, monkeypatch, "first", "--minutes", "0.0001")
    weights = torch.load(tmp_path / "first/checkpoint.pth", weights_only=True)["averaged"]
    weights["final_layer.bias"] += 5.0
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, tmp_path / "w.pth"
    )
    _run(data, tmp_path, monkeypatch, "second", "--minutes", "0.0001", "--start", str(tmp_path / "w.pth"))
    started = torch.load(tmp_path / "second/checkpoint.pth", weights_only=True)["averaged"]
    assert started["final_layer.bias"].min() > 4


def test_a_config_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG + "\nlearning_rat = 1\n")
    with pytest.raises(ValueError, match="learning_rat"):
        Config.read(tmp_path / "config.toml")


def test_cached_crops_carry_their_labels(data, tmp_path):
    people = cached_people(data / "train/drawn.json", tmp_path, 64)
    again = cached_people(data / "train/drawn.json", tmp_path, 64)
    assert len(people) == len(again) == 6
    np.testing.assert_array_equal(people.crop(3), again.crop(3))
    assert people.weights.min() == 1
    # The padded box is 64 high in the crop's pixels, since it was higher in the picture's.
    np.testing.assert_allclose(people.sizes[:, 1], 64, rtol=0.02)


def test_a_share_of_one_and_a_half_takes_everybody_once_or_twice(data, tmp_path):
    people = cached_people(data / "train/drawn.json", tmp_path, 64)
    order = epoch_order([people], [1.5], (1, 2))
    counts = np.bincount([index for _, index in order], minlength=6)
    assert set(counts) <= {1, 2}
    assert order == epoch_order([people], [1.5], (1, 2))
    assert order != epoch_order([people], [1.5], (1, 3))


def test_the_loss_is_least_at_the_targets_and_blind_to_unlabelled_joints():
    keypoints = torch.tensor([[[3.3, 4.0], [8.0, 9.5]]])
    targets = target_heatmaps(keypoints, 16, 12, 1.5)
    weights = torch.tensor([[1.0, 0.0]])
    least = heatmap_loss(targets, targets, weights, 1.0)
    assert heatmap_loss(targets.roll(1, 3), targets, weights, 1.0) > least
    spoilt = targets.clone()
    spoilt[0, 1] = 7.0
    torch.testing.assert_close(heatmap_loss(spoilt, targets, weights, 1.0), least)
