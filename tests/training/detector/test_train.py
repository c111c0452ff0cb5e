"""The detector's trainer on drawn photos: it goes on where it stopped, and gives the same weights either way."""

import json
import threading

import pytest
import torch

from training.detector.train import Config, Run, main, train
from training.files import DataError
from training.trainer import STOPPED, Place

CONFIG = """
seed = 3
channels = 16
side = 96
dev = "dev/coco"
[sets]
"train/drawn" = 1.5
"train/nobody" = 1.0
[[stages]]
size = 64
pictures = 4
batch = 2
learning_rate = 1e-3
scale = [0.4, 0.9]
mosaic = 0.5
warm_up = 1
[[stages]]
size = 96
pictures = 2
batch = 2
learning_rate = 1e-3
scale = [0.7, 1.1]
mosaic = 0.0
"""


def _run(data, tmp_path, monkeypatch, name, *more):
    (tmp_path / "config.toml").write_text(CONFIG)
    command = ["train", str(tmp_path / "config.toml"), "--data", str(data), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", [*command, "--run", str(tmp_path / name), *more])
    try:
        main()
    except SystemExit as ended:
        if ended.code != STOPPED or "--minutes" not in more:
            raise


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(data, tmp_path, monkeypatch):
    _run(data, tmp_path, monkeypatch, "whole")
    for _ in range(8):  # each call makes at least one step
        if (tmp_path / "parts/weights.pth").exists():
            break
        _run(data, tmp_path, monkeypatch, "parts", "--minutes", "0.00001")
    whole, parts = (torch.load(tmp_path / run / "weights.pth", weights_only=True) for run in ("whole", "parts"))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "dev_box" in line]) == 3


def test_a_run_that_is_told_to_stop_keeps_what_it_has(data, tmp_path):
    (tmp_path / "config.toml").write_text(
        CONFIG.replace("warm_up = 1", "warm_up = 2").replace("pictures = 4", "pictures = 8")
    )
    stopped = threading.Event()
    stopped.set()
    place = Place(tmp_path / "run", stopped=stopped)
    run = Run(Config.read(tmp_path / "config.toml"), data, tmp_path / "cache", place, torch.device("cpu"))
    assert not train(run, None, None)
    content = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert (content["stage"], content["step"]) == (0, 1)
    # Half-way through the warm-up; a quarter of it for the backbone.
    assert [group["lr"] for group in content["optimizer"]["param_groups"]] == pytest.approx([1.25e-4, 1.25e-4, 5e-4, 5e-4])


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("size = 64", "size = 300", "stages.0.size: .*multiple of 32"),
        ("warm_up", "warmup", "stages.0.warmup: Extra inputs"),
        ("batch = 2", "batch = 0", "stages.0.batch: .*greater than or equal to 1"),
        ("scale = [0.4, 0.9]", "scale = [0, 1]", "stages.0.scale.0: .*greater than 0"),
        ("pictures = 4", "pictures = 1", "stages.0: pictures are fewer than one batch"),
    ],
)
def test_a_config_that_no_run_can_follow_is_refused(tmp_path, right, wrong, told):
    (tmp_path / "config.toml").write_text(CONFIG.replace(right, wrong))
    with pytest.raises(DataError, match=f"config.toml: {told}"):
        Config.read(tmp_path / "config.toml")


def test_a_file_of_other_weights_is_named(data, tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    torch.save({"stem.weight": torch.zeros(1)}, file)
    with pytest.raises(SystemExit, match=r"w.pth holds no weights that fit: of a detector of 16 channels, \d+ tensors"):
        _run(data, tmp_path, monkeypatch, "run", "--start", str(file))
    with pytest.raises(SystemExit, match=r"w.pth is not EfficientNet-Lite0's: "):
        _run(data, tmp_path, monkeypatch, "run", "--imagenet", str(file))
