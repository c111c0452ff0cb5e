"""The detector's trainer on drawn photos: it goes on where it stopped, and gives the same weights either way."""

import json
import threading
import time

import pytest
import torch

from training.detector.train import Config, Places, main, train

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
    monkeypatch.setattr("signal.signal", lambda *_: None)
    main()


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
    (tmp_path / "config.toml").write_text(CONFIG)
    stopped = threading.Event()
    stopped.set()
    places = Places(data, tmp_path / "cache", tmp_path / "run", time.monotonic() + 600, stopped)
    assert not train(Config.read(tmp_path / "config.toml"), places, None, None)
    content = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert (content["stage"], content["step"]) == (0, 1)


def test_a_config_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG.replace("warm_up", "warmup"))
    with pytest.raises(ValueError, match="warmup"):
        Config.read(tmp_path / "config.toml")
