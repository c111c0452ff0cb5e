"""The trainer on a tiny set: it learns, it goes on where it stopped, and gives the same weights either way."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from app.inference.model_store import ModelError
from app.vision import heatmap
from training import trainer
from training.augment import Augmentation, augmented_batch
from training.config import Config
from training.data import cached_people
from training.decoders import OURS
from training.export import export
from training.files import DataError, write_together, write_whole
from training.keypoints import MIRROR
from training.loss import heatmap_loss, target_heatmaps, trust_in
from training.lpn import LPN
from training.pixels import normalised
from training.schedule import averaging, epoch_order, learning_rate, write_line
from training.train import Run, _parameter_groups, losses_of, main, steps_of, teacher_of
from training.trainer import STOPPED, Place
from training.weights import read_lpn

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
warm_up = 1
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


def _run(data, tmp_path, monkeypatch, name, *more, config=CONFIG):
    (tmp_path / "config.toml").write_text(config)
    command = ["train", str(tmp_path / "config.toml"), "--data", str(data), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", [*command, "--run", str(tmp_path / name), *more])
    try:
        main()
    except SystemExit as ended:
        if ended.code != STOPPED or "--minutes" not in more:
            raise


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


def test_a_run_that_is_stopped_ends_as_a_failure_does(data, tmp_path, monkeypatch):
    """Or `train && export` would export what is not there, or the weights of a run before."""
    _run(data, tmp_path, monkeypatch, "run", "--minutes", "0")
    assert not (tmp_path / "run/weights.pth").exists()
    with pytest.raises(SystemExit, match="stopped before its end; the same command goes on"):
        main()


def test_a_run_goes_on_with_its_own_config_alone_to_which_stages_may_be_added(data, tmp_path, monkeypatch):
    one, other = CONFIG[: CONFIG.rindex("[[stages]]")], CONFIG[CONFIG.rindex("[[stages]]") :]
    _run(data, tmp_path, monkeypatch, "run", "--minutes", "0.0001", config=one)
    for changed in (one.replace("seed = ", "seed = 7"), one.replace("1e-3", "2e-3")):
        assert "it is of another config, as far as this run has come" in _ended(data, tmp_path, monkeypatch, config=changed)
    _run(data, tmp_path, monkeypatch, "run", config=one)
    first = torch.load(tmp_path / "run/weights.pth", weights_only=True)["final_layer.bias"]
    _run(data, tmp_path, monkeypatch, "run", config=one + other)
    assert (torch.load(tmp_path / "run/weights.pth", weights_only=True)["final_layer.bias"] != first).any()
    _run(data, tmp_path, monkeypatch, "both", config=one + other)
    whole = torch.load(tmp_path / "both/weights.pth", weights_only=True)
    for name, value in torch.load(tmp_path / "run/weights.pth", weights_only=True).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)


def test_the_loss_compiles_into_one_graph():
    stage = Config.model_validate(tomllib.loads(CONFIG)).stages[0]
    run = Run(Config.model_validate(tomllib.loads(CONFIG)), Path(), Path(), Place(Path()), torch.device("cpu"), True, False)
    loss_of = losses_of(run, LPN(50), stage)
    crops = torch.zeros((2, 64, 48, 3), dtype=torch.uint8)
    assert (
        torch._dynamo.explain(loss_of)(
            crops, torch.zeros(2, 17, 2), torch.ones(2, 17), torch.zeros(2, 0, 0, 0)
        ).graph_break_count
        == 0
    )


def test_a_run_starts_from_given_weights(data, tmp_path, monkeypatch):
    _run(data, tmp_path, monkeypatch, "first", "--minutes", "0.0001")
    checkpoint = torch.load(tmp_path / "first/checkpoint.pth", weights_only=True)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == 0.5e-3  # half-way through the warm-up
    weights = checkpoint["averaged"]
    weights["final_layer.bias"] += 5.0
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, tmp_path / "w.pth"
    )
    _run(data, tmp_path, monkeypatch, "second", "--minutes", "0.0001", "--start", str(tmp_path / "w.pth"))
    started = torch.load(tmp_path / "second/checkpoint.pth", weights_only=True)["averaged"]
    assert started["final_layer.bias"].min() > 4


def test_a_stage_starts_from_the_averaged_weights_of_the_one_before(data, tmp_path, monkeypatch):
    one, other = CONFIG[: CONFIG.rindex("[[stages]]")], CONFIG[CONFIG.rindex("[[stages]]") :]
    _run(data, tmp_path, monkeypatch, "one", config=one)
    _run(data, tmp_path, monkeypatch, "both", config=one + other.replace("1e-3", "0.0"))
    first, last = (torch.load(tmp_path / run / "weights.pth", weights_only=True) for run in ("one", "both"))
    torch.testing.assert_close(last["conv1.weight"], first["conv1.weight"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("sets", ["drawn = 0.0", "drawn = -1.0", "drawn = nan", ""])
def test_a_config_that_draws_nobody_is_refused(tmp_path, sets):
    (tmp_path / "config.toml").write_text(CONFIG.replace("drawn = 1.5", sets))
    with pytest.raises(DataError, match=r"config.toml: sets"):
        Config.read(tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("changed", "told"), [("crops = 1", "crops are fewer than one batch"), ("height = 0", "height: .*than 0")]
)
def test_a_config_that_no_run_can_follow_is_refused(tmp_path, changed, told):
    key = changed.split()[0]
    (tmp_path / "config.toml").write_text(re.sub(f"^{key} = .*", changed, CONFIG, count=1, flags=re.MULTILINE))
    with pytest.raises(DataError, match=rf"config.toml: stages.0.*{told}"):
        Config.read(tmp_path / "config.toml")


def test_a_config_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG + "\nlearning_rat = 1\n")
    with pytest.raises(DataError, match=r"config.toml: .*learning_rat"):
        Config.read(tmp_path / "config.toml")


@pytest.mark.parametrize("number", [6, 7])  # reduced with and without smoothing
def test_cached_crops_carry_their_labels(tmp_path, number):
    (tmp_path / "train").mkdir()
    picture = np.zeros((700, 900, 3), np.uint8)
    joints = np.zeros((17, 3))
    joints[:, 0], joints[:, 1] = 420 + 15 * np.arange(17), 620 - 25 * np.arange(17)
    joints[:16, 2] = 2
    for x, y, _ in joints.astype(int).tolist():
        cv2.circle(picture, (x, y), 8, (255, 255, 255), cv2.FILLED)
    cv2.imwrite(str(tmp_path / "train/1.png"), picture)
    trust = np.linspace(0.2, 1, 17)
    person = {"id": number, "image_id": 1, "category_id": 1, "bbox": [400, 200, 280, 440], "area": 9000, "iscrowd": 0}
    person |= {"num_keypoints": 16, "keypoints": joints.ravel().tolist(), "keypoint_weights": trust.tolist()}
    image = {"id": 1, "file_name": "1.png", "width": 900, "height": 700}
    file = tmp_path / "train/drawn.json"
    file.write_text(json.dumps({"images": [image], "annotations": [person, person | {"id": 9, "bbox": [5, 5, 0, 50]}]}))
    people = cached_people(file, tmp_path / "cache", 128)
    assert len(people) == 1  # who has a box without area is left out
    np.testing.assert_allclose(people.weights[0], [*trust[:16], 0], rtol=1e-6)
    np.testing.assert_allclose(people.sizes[0], [96, 128], rtol=0.02)  # the padded box, which was higher in the picture
    parts, _, _, places = cv2.connectedComponentsWithStats((people[0][..., 0] > 127).astype(np.uint8))
    assert parts == 18
    np.testing.assert_allclose(sorted(places[1:].tolist()), sorted(people.keypoints[0].tolist()), atol=0.5)
    np.testing.assert_array_equal(people[0], cached_people(file, tmp_path / "cache", 128)[0])


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


MORE = """
[augmentation]
turned = 0.2
occluded = 0.5
pasted = 0.5
reduced = 0.3
blurred = 0.3
jpeg = 0.3
"""


@pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future
def test_a_run_with_every_change_on_its_device_and_a_teacher_ends_with_weights_and_curves(data, tmp_path, monkeypatch):
    teacher = export(LPN(50).state_dict(), tmp_path, "teacher", "1", OURS, height=64)
    text = CONFIG.replace("crops = 16", "crops = 4\nhardest = 8").replace("crops = 8", "crops = 4")
    text = text.replace("[sets]", f'{MORE}\n[distillation]\nmodel = "{teacher}"\nshare = 0.5\n[sets]')
    monkeypatch.setattr(trainer, "_REPORT_SECONDS", 0)
    _run(data, tmp_path, monkeypatch, "device", "--resident", "--device", "cpu", config=text)
    assert torch.load(tmp_path / "device/weights.pth", weights_only=True)["final_layer.bias"].abs().max() > 0
    assert (tmp_path / "device/curves.png").read_bytes().startswith(b"\x89PNG")
    assert '"crops_per_second"' in (tmp_path / "device/log.jsonl").read_text()


@pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future
def test_a_teacher_is_asked_with_flip_test_and_about_crops_of_its_own_height(data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = LPN(50).eval()
    torch.nn.init.normal_(teacher.final_layer.weight, std=0.1)
    folder = export(teacher.state_dict(), tmp_path, "teacher", "1", OURS, height=64)
    text = CONFIG.replace("[sets]", f'[distillation]\nmodel = "{folder}"\nshare = 0.5\n[sets]')
    config = Config.model_validate(tomllib.loads(text))
    sets = [cached_people(data / f"train/{name}.json", tmp_path / "cache", 64) for name in config.sets]
    for on_device in (False, True):
        run = Run(config, data, tmp_path, Place(tmp_path), torch.device("cpu"), on_device=on_device, compiled=False)
        crops, _, _, taught = next(steps_of(run, sets, config.stages[0], 0, 0))
        with torch.no_grad():
            maps, mirrored = (teacher(normalised(each.round())).numpy() for each in (crops, crops.flip(2)))
        np.testing.assert_allclose(taught, heatmap.average_with_mirrored(maps, mirrored, MIRROR, 0.75), atol=1e-3)
    other = Config.model_validate(tomllib.loads(text.replace("height = 64", "height = 128"))).stages[0]
    with pytest.raises(DataError, match="teacher/1 takes crops 64 high and 48 wide, and a stage has 128 and 96"):
        teacher_of(run, other)
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace('"left_eye", "right_eye"', '"right_eye", "left_eye"'))
    with pytest.raises(ModelError, match="teacher/1 knows other joints"):
        teacher_of(run, config.stages[0])
    told = _ended(data, tmp_path, monkeypatch, config=text)  # before it begins
    assert "teacher/1 knows other joints" in told
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_trusted_as_far_as_its_heatmap_is_high():
    heatmaps = torch.full((1, 3, 8, 6), -0.2)
    heatmaps[0, 0, 3, 2] = 0.3
    heatmaps[0, 1, 3, 2] = 1.2
    torch.testing.assert_close(trust_in(heatmaps), torch.tensor([[0.3, 1.0, 0.0]]))


def test_only_the_hardest_joints_count():
    targets = target_heatmaps(torch.tensor([[[3.0, 4.0], [8.0, 9.0], [5.0, 5.0]]]), 16, 12, 1.5)
    found = targets.clone()
    found[0, 1] = 0.0
    weights = torch.ones(1, 3)
    alone = heatmap_loss(found[:, 1:2], targets[:, 1:2], torch.ones(1, 1), 1.0)
    torch.testing.assert_close(heatmap_loss(found, targets, weights, 1.0, hardest=1), alone)
    assert heatmap_loss(found, targets, weights, 1.0) < alone


def test_an_absent_joint_that_is_found_absent_is_none_of_the_hardest():
    """Its cross-entropy is that of a map which is level."""
    targets = target_heatmaps(torch.tensor([[[-250.0, -250.0], [8.0, 9.0]]]), 16, 12, 1.5)
    found = targets.clone()
    found[0, 1] *= 0.5
    assert heatmap_loss(found[:, :1], targets[:, :1], torch.ones(1, 1), 1.0) > 5
    hardest = heatmap_loss(found, targets, torch.ones(1, 2), 1.0, hardest=1)
    torch.testing.assert_close(hardest, heatmap_loss(found[:, 1:], targets[:, 1:], torch.ones(1, 1), 1.0))


def test_a_person_counts_by_the_root_of_the_labelled_joints():
    targets = target_heatmaps(torch.tensor([[[3.0, 4.0]] * 4, [[8.0, 9.0]] * 4]), 16, 12, 1.5)
    weights = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    found = targets.clone()
    found[1] = 0.0
    many, one = (heatmap_loss(found[i : i + 1], targets[i : i + 1], weights[i : i + 1], 1.0) for i in range(2))
    torch.testing.assert_close(heatmap_loss(found, targets, weights, 1.0), (2 * many + one) / 3)


def _ended(data, tmp_path, monkeypatch, *more, config=CONFIG):
    with pytest.raises(SystemExit) as ended:
        _run(data, tmp_path, monkeypatch, "run", *more, config=config)
    return ended.value.code


def test_a_set_of_a_later_stage_is_missed_before_the_first_begins(data, tmp_path, monkeypatch):
    said = _ended(data, tmp_path, monkeypatch, config=CONFIG + "sets = {absent = 1.0}\n")
    assert "train/absent.json cannot be read: No such file or directory" in said
    assert not (tmp_path / "run").exists()


def test_weights_that_a_run_no_longer_starts_from_are_told(data, tmp_path, monkeypatch, caplog):
    start = ("--start", str(Path(__file__).parents[2] / "model_store/lpn50/1/weights.pth"))
    for _ in range(2):
        assert not [told for told in caplog.messages if "is passed over" in told]
        _run(data, tmp_path, monkeypatch, "run", "--minutes", "0", *start)
    assert [told for told in caplog.messages if told.startswith("--start") and "is passed over: the run has begun" in told]


def test_a_short_stage_is_warmed_up_for_half_of_it(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "learning_rate", lambda *told: asked.append(told) or 1e-3)
    _run(data, tmp_path, monkeypatch, "run", config=CONFIG.replace("warm_up = 2", "warm_up = 200"))
    assert [warm_up for _, warm_up, _, of in asked if of == 4] == [2] * 4


def test_a_device_that_is_not_here_is_told(data, tmp_path, monkeypatch, capsys):
    for device in ("foo", "cuda:99"):
        with pytest.raises(SystemExit):
            _run(data, tmp_path, monkeypatch, "run", "--device", device)
        assert f"argument --device: {device} is no device that PyTorch has here" in capsys.readouterr().err


def test_weights_to_start_from_that_are_none_are_named(data, tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    assert "w.pth holds no weights that fit: it cannot be read" in _ended(data, tmp_path, monkeypatch, "--start", str(file))
    file.write_bytes(b"no weights")
    assert "w.pth holds no weights that fit: PyTorch" in _ended(data, tmp_path, monkeypatch, "--start", str(file))
    torch.save(LPN(101).state_dict(), file)
    said = _ended(data, tmp_path, monkeypatch, "--start", str(file))
    assert "w.pth holds no weights that fit: they are of an LPN-101, and an LPN-50 is asked for" in said


def test_a_checkpoint_of_another_depth_or_half_of_one_is_named_and_kept(data, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run/checkpoint.pth"
    checkpoint.parent.mkdir()
    weights = LPN(101).state_dict()
    torch.save({"stage": 0, "step": 1, "optimizer": {}, "model": weights, "averaged": weights, "config": "{}"}, checkpoint)
    whole = checkpoint.read_bytes()
    assert "checkpoint.pth cannot be gone on from: it is of an LPN-101" in _ended(data, tmp_path, monkeypatch)
    checkpoint.write_bytes(whole[:100_000])
    assert "checkpoint.pth cannot be gone on from: PyTorch" in _ended(data, tmp_path, monkeypatch)
    assert checkpoint.read_bytes() == whole[:100_000]


def test_a_corrupt_picture_is_named_and_leaves_no_cache(data, tmp_path, monkeypatch):
    spoilt = tmp_path / "data"
    shutil.copytree(data, spoilt)
    with zipfile.ZipFile(spoilt / "train/drawn-0.zip", "w") as archive:
        for number in range(1, 7):
            archive.writestr(f"{number}.png", b"no picture")
    assert "1.png is not a picture" in _ended(spoilt, tmp_path, monkeypatch)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_stage_may_have_sets_of_its_own(data, tmp_path, monkeypatch):
    stages = CONFIG.index("[[stages]]")
    config = CONFIG[:stages] + CONFIG[stages:].replace("sigma = 1.0\n", "sigma = 1.0\nsets = {other = 1.0}\n", 1)
    assert "other.json cannot be read" in _ended(data, tmp_path, monkeypatch, config=config)


def test_the_ending_of_a_stage_draws_from_its_own_sets_also_after_a_stop(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    content = json.loads((data / "train/drawn.json").read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"][3:] = [0] * 48  # the nose alone
    (tmp_path / "train/noses.json").write_text(json.dumps(content))
    text = CONFIG.replace("[sets]", "[sets]\nnoses = 0.0").replace(
        "warm_up = 2", "warm_up = 2\nending = {share = 0.25, sets = {noses = 1.0}}"
    )
    config = Config.model_validate(tomllib.loads(text))
    sets = [cached_people(tmp_path / f"train/{name}.json", tmp_path / "cache", 64) for name in config.sets]
    run = Run(config, tmp_path, tmp_path, Place(tmp_path), torch.device("cpu"), on_device=False, compiled=False)

    def steps(first):
        return list(islice(steps_of(run, sets, config.stages[0], 0, first), 4 - first))

    labelled = [int((weights > 0).sum(1).max()) for _, _, weights, _ in steps(0)]
    assert min(labelled[:3]) > 1
    assert labelled[3] == 1
    for first in (2, 3):
        for gone_on, at_once in zip(steps(first), steps(0)[first:], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(gone_on, at_once, strict=True))


def test_the_ending_of_a_stage_changes_crops_in_its_own_way(data, tmp_path):
    text = CONFIG.replace(
        "warm_up = 2",
        "warm_up = 2\nending = {share = 0.25, sets = {drawn = 1.0}, augmentation = {grey = 1.0, colour = 0.0}}",
    )
    config = Config.model_validate(tomllib.loads(text))
    sets = [cached_people(data / f"train/{name}.json", tmp_path / "cache", 64) for name in config.sets]
    run = Run(config, data, tmp_path, Place(tmp_path), torch.device("cpu"), on_device=False, compiled=False)
    crops = [step[0].int() for step in islice(steps_of(run, sets, config.stages[0], 0, 0), 4)]
    grey = [bool((each.amax(-1) == each.amin(-1)).all()) for each in crops]
    assert grey == [False, False, False, True]


def test_an_ending_with_a_set_that_its_stage_has_not_is_refused(tmp_path):
    text = CONFIG.replace("warm_up = 2", "warm_up = 2\nending = {share = 0.25, sets = {drwan = 1.0}}")
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(DataError, match=r"config\.toml: stages\.0\.ending\.sets: no set of the stage: drwan"):
        Config.read(tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("[[stages]]", "[augmentation]\nscale = 1.5\n[[stages]]", r"augmentation\.scale: .* less than 1"),
        ("[[stages]]", "[augmentation]\nmirrored = 50\n[[stages]]", r"augmentation\.mirrored: .* less than or equal to 1"),
        ("[[stages]]", "[augmentation]\nshift = -1\n[[stages]]", r"augmentation\.shift: .* greater than or equal to 0"),
        ("[[stages]]", "[augmentation]\ncut = nan\n[[stages]]", r"augmentation\.cut: "),
    ],
)
def test_a_config_out_of_range_is_refused(tmp_path, before, after, told):
    (tmp_path / "config.toml").write_text(CONFIG.replace(before, after, 1))
    with pytest.raises(DataError, match=told):
        Config.read(tmp_path / "config.toml")


FAULTS = [
    ("keypoints", [float("nan")] * 51), ("keypoints", None), ("keypoints", [1, 2, 2]), ("bbox", [5, 5, "80", 110]),
    ("bbox", None), ("bbox", [5, 5, 80, float("inf")]), ("keypoint_weights", [1.0] * 16),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FAULTS)
def test_an_annotation_that_is_none_is_named(data, tmp_path, monkeypatch, key, value):
    spoilt = tmp_path / "data"
    shutil.copytree(data, spoilt)
    content = json.loads((spoilt / "train/drawn.json").read_text())
    content["annotations"][2][key] = value
    (spoilt / "train/drawn.json").write_text(json.dumps(content))
    said = _ended(spoilt, tmp_path, monkeypatch)
    assert f"drawn.json: annotation 3 has a {key} that is not" in said


def test_annotations_that_are_no_tables_are_named(data, tmp_path, monkeypatch):
    spoilt = tmp_path / "data"
    shutil.copytree(data, spoilt)
    (spoilt / "train/drawn.json").write_text('{"images": [], "annotations": [7]}')
    assert "drawn.json: " in _ended(spoilt, tmp_path, monkeypatch)


def test_a_set_without_anybody_is_named(data, tmp_path, monkeypatch):
    empty = tmp_path / "data"
    shutil.copytree(data, empty)
    (empty / "train/drawn.json").write_text('{"images": [], "annotations": []}')
    assert "drawn.json holds nobody with keypoints" in _ended(empty, tmp_path, monkeypatch)


def test_a_cache_without_its_end_is_named(data, tmp_path, monkeypatch):
    cached_people(data / "train/drawn.json", tmp_path / "cache", 64)
    (tmp_path / "cache/train-drawn-64.bin").write_bytes(b"\0" * 100)
    assert "train-drawn-64.npz and train-drawn-64.bin do not belong together" in _ended(data, tmp_path, monkeypatch)


def test_a_cache_of_a_set_that_has_changed_is_made_anew(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    file = tmp_path / "train/drawn.json"
    assert len(cached_people(file, tmp_path / "cache", 64)) == 6
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:2]
    file.write_text(json.dumps(content))
    assert len(cached_people(file, tmp_path / "cache", 64)) == 2


def test_weights_that_are_no_numbers_end_the_run_and_leave_the_checkpoint(data, tmp_path, monkeypatch):
    last_is_steep = "1e38".join(CONFIG.rsplit("1e-3", 1))
    said = _ended(data, tmp_path, monkeypatch, config=last_is_steep)
    assert "in stage 1 the weights are no numbers any more at step 2" in said
    content = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert (content["stage"], content["step"]) == (1, 0)
    assert all(bool(value.isfinite().all()) for value in content["model"].values())


def test_a_full_disk_is_told_and_leaves_the_file_that_was_there(tmp_path):
    file = tmp_path / "checkpoint.pth"
    write_whole(file, b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DataError, match=r"checkpoint.pth cannot be written"):
            write_whole(file, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_belong_together_are_all_on_the_disk_before_one_is_replaced(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("model.onnx", "golden.png", "model.toml")]
    write_together(dict.fromkeys(files, b"before"))
    synced = []

    def full_in_the_end(descriptor):
        synced.append(descriptor)
        if len(synced) == len(files):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_in_the_end)
    with pytest.raises(DataError, match=r"model.toml cannot be written: No space left"):
        write_together(dict.fromkeys(files, b"after"))
    assert [file.read_bytes() for file in files] == [b"before"] * 3
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_log_on_a_full_disk_is_told_and_has_no_half_line(tmp_path):
    write_line(tmp_path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
    try:
        with pytest.raises(DataError, match=r"log.jsonl cannot be written"):
            write_line(tmp_path, {"step": "2" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write_line(tmp_path, {"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 3]


def test_a_process_killed_while_it_writes_leaves_the_file_that_was_there(tmp_path):
    file = tmp_path / "checkpoint.pth"
    write_whole(file, b"before")
    code = (
        "import os, pathlib, signal, sys\n"
        "from training.files import whole_file\n"
        "with whole_file(pathlib.Path(sys.argv[1])) as out:\n"
        "    out.write(bytes(100_000)); out.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(file)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9
    assert file.read_bytes() == b"before"


def test_the_learning_rate_warms_up_and_falls_like_half_a_cosine():
    rates = [learning_rate(2.0, 4, step, 104) for step in range(104)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert rates[103] == pytest.approx(0.02, abs=0.001)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_norms_and_biases_are_not_decayed():
    model = LPN(50)
    decayed, plain = _parameter_groups(model)
    assert (decayed["weight_decay"] > 0, plain["weight_decay"]) == (True, 0)
    assert {parameter.ndim for parameter in decayed["params"]} == {4}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_teacher_moves_the_loss_by_its_share():
    torch.manual_seed(0)
    taught = torch.rand(2, 17, 16, 12)
    model, stage = LPN(50), Config.model_validate(tomllib.loads(CONFIG)).stages[0]
    crops = torch.randint(0, 255, (2, 64, 48, 3), dtype=torch.uint8)
    losses = []
    for share in (0.0, 0.5, 1.0):
        more = f'[distillation]\nmodel = "teacher"\nshare = {share}\n' if share else ""
        config = Config.model_validate(tomllib.loads(CONFIG.replace("[sets]", more + "[sets]")))
        run = Run(config, Path(), Path(), Place(Path()), torch.device("cpu"), True, False)
        with torch.no_grad():
            losses.append(float(losses_of(run, model, stage)(crops, torch.full((2, 17, 2), 20.0), torch.ones(2, 17), taught)))
    assert abs(losses[0] - losses[2]) > 1e-3
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=0.05)


def test_averaged_weights_keep_the_share_of_themselves():
    kept, new = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    torch.nn.init.constant_(new.weight, 2)
    averaging(kept, new)(0.9)
    assert kept.weight.item() == pytest.approx(1.1)


def test_training_lowers_the_loss(data, tmp_path, monkeypatch):
    stage = CONFIG[CONFIG.index("[[stages]]") : CONFIG.rindex("[[stages]]")].replace("crops = 16", "crops = 160")
    config = CONFIG[: CONFIG.index("[[stages]]")] + stage + "average = 0.5\n"
    _run(data, tmp_path, monkeypatch, "run", config=config)
    people = cached_people(data / "train/drawn.json", tmp_path / "cache", 64)
    batch = augmented_batch(
        [people], [(0, index) for index in range(len(people))], 64, Augmentation.none(), np.random.default_rng(0)
    )
    targets = target_heatmaps(torch.from_numpy(batch.keypoints) / 4, 16, 12, 1.0)
    torch.manual_seed(3)
    losses = []
    for model in (LPN(50), read_lpn(tmp_path / "run/weights.pth")):
        with torch.no_grad():
            heatmaps = model.train()(normalised(torch.from_numpy(batch.crops)))
        losses.append(float(heatmap_loss(heatmaps, targets, torch.from_numpy(batch.weights), 1.0)))
    assert losses[1] < losses[0] - 0.2  # of which most is the entropy of the targets
