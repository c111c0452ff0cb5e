"""Ablations: each run differs from the recipe in what it says, and the table compares them."""

import json
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from app.inference.pose import PoseModel
from training import ablate
from training.config import Config
from training.data import Picture
from training.decoders import Decoder
from training.detector.train import Config as DetectorConfig
from training.estimators import decoder_of, local_estimator
from training.files import DataError
from training.weights import read_lpn

CONFIGS = Path(__file__).parents[2] / "training/configs"
BASE = """
seed = 3
depth = 50
sets = {drawn = 1.0}
[[stages]]
height = 128
crops = 400
batch = 4
learning_rate = 1e-3
sigma = 1.0
"""
ABLATIONS = """
base = "base.toml"
[[changes.stages]]
height = 64
crops = 2
batch = 2
learning_rate = 1e-3
sigma = 1.0
[runs.recipe]
[runs."without GC blocks"]
attention = false
"""


def test_every_config_of_the_repository_is_valid():
    for file in CONFIGS.glob("lpn*.toml"):
        assert Config.read(file).stages
    for file in CONFIGS.glob("person-det*.toml"):
        assert DetectorConfig.read(file).stages
    for file in CONFIGS.glob("ablations*.toml"):
        recipe, *others = [run.config for run in ablate.variants(file)]
        assert len({sum(stage.crops for stage in config.stages) for config in (recipe, *others)}) == 1  # an equal budget
        assert recipe not in others
    by_name = {run.name: run.config for run in ablate.variants(CONFIGS / "ablations.toml")}
    recipe = by_name["recipe"]
    assert by_name["occluders"].augmentation == recipe.augmentation.model_copy(update={"occluded": 0.3})
    assert by_name["without lspet"].sets == recipe.sets | {"lspet": 0.0}


@pytest.fixture
def folder(tmp_path):
    """Configs, and one photo with one labelled person for training and for dev."""
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "runs.toml").write_text(ABLATIONS)
    rng = np.random.default_rng(0)
    for part, name in (("train", "drawn"), ("dev", "coco")):
        (tmp_path / part).mkdir()
        joints = np.hstack([rng.uniform(5, 85, (17, 2)), np.full((17, 1), 2)])
        person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 80, 110], "area": 4000, "iscrowd": 0}
        person |= {"num_keypoints": 17, "keypoints": joints.ravel().tolist()}
        image = {"id": 1, "file_name": "1.png", "zip": "a.zip", "width": 90, "height": 120}
        content = {"images": [image], "annotations": [person], "categories": [{"id": 1, "name": "person"}]}
        (tmp_path / part / f"{name}.json").write_text(json.dumps(content))
        with zipfile.ZipFile(tmp_path / part / "a.zip", "w") as archive:
            archive.writestr("1.png", cv2.imencode(".png", rng.integers(0, 255, (120, 90, 3), np.uint8))[1].tobytes())
    return tmp_path


def test_runs_are_trained_and_compared_and_finished_ones_not_again(folder, monkeypatch):
    command = ["ablate", str(folder / "runs.toml"), "--data", str(folder), "--out", str(folder / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--cache", str(folder / "cache"), "--device", "cpu"])
    ablate.main()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (folder / "out/table.md").read_text().splitlines()]
    assert rows[2][:2] == ["run", "AP, coco"]
    assert rows[4][0] == rows[11][0] == "recipe"
    assert rows[5][0] == rows[12][0] == "without GC blocks"
    assert "[" not in rows[4][2]
    assert "[" in rows[5][2]  # the difference to the first
    assert rows[9][:2] == ["", "nose"]
    before = (folder / "out/recipe/weights.pth").stat().st_mtime_ns
    ablate.main()
    assert (folder / "out/recipe/weights.pth").stat().st_mtime_ns == before
    assert len(list((folder / "out/recipe").glob("accuracy-*.json"))) == 1
    monkeypatch.setattr(ablate, "OURS", Decoder(np.inf))  # measured with another decoder, it is another figure
    ablate.main()
    assert len(list((folder / "out/recipe").glob("accuracy-*.json"))) == 2


@pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future
def test_weights_are_measured_as_their_model_of_the_store_is(exported):
    root = Path(__file__).parents[2]
    weights, photo = root / "model_store/lpn50/1/weights.pth", root / "tests/data/reference/astronaut_384.png"
    picture = Picture({"file_name": "1.png", "width": 384, "height": 384}, [], photo.read_bytes())
    network = read_lpn(weights).eval()
    model = PoseModel.load(exported)
    boxes = np.array([[60.0, 10.0, 249.0, 359.0]])
    ours = ablate.torch_estimator(network, 256, torch.device("cpu"))(picture, boxes)[""]
    theirs = local_estimator(model, [decoder_of(model)], [False])(picture, boxes)[""]
    np.testing.assert_allclose(ours, theirs[..., :3], rtol=0, atol=0.05)


def test_a_run_with_an_unknown_key_is_refused(folder):
    (folder / "runs.toml").write_text(ABLATIONS + "attentoin = false\n")
    with pytest.raises(DataError, match=r"runs.toml: [^\n]*attentoin[^\n]*$"):
        ablate.variants(folder / "runs.toml")


def test_results_from_before_a_key_of_configs_are_taken(folder, monkeypatch):
    command = ["ablate", str(folder / "runs.toml"), "--data", str(folder), "--out", str(folder / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--cache", str(folder / "cache"), "--device", "cpu"])
    ablate.main()
    for file in (folder / "out").glob("*/config.json"):
        content = json.loads(file.read_text())
        del content["config"]["rendered"]
        file.write_text(json.dumps(content))
    ablate.main()


def test_results_of_another_config_or_start_are_not_taken(folder, monkeypatch):
    command = ["ablate", str(folder / "runs.toml"), "--data", str(folder), "--out", str(folder / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--cache", str(folder / "cache"), "--device", "cpu"])
    ablate.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--start", str(folder / "out/recipe/weights.pth")])
    with pytest.raises(SystemExit, match=r"recipe/config.json is of another config or start"):
        ablate.main()
    monkeypatch.setattr("sys.argv", sys.argv[:-2])
    text = (folder / "runs.toml").read_text()
    (folder / "runs.toml").write_text(text.replace("sigma = 1.0", "sigma = 1.1"))
    assert (folder / "runs.toml").read_text() != text
    with pytest.raises(SystemExit, match=r"recipe/config.json is of another config"):
        ablate.main()
    (folder / "runs.toml").write_text(text + '[runs."recipe!"]\n[runs."recipe?"]\n')
    with pytest.raises(DataError, match="names of runs must differ"):
        ablate.variants(folder / "runs.toml")
