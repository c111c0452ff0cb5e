"""The trainer draws rendered people: from a set like any other, or while it runs, by seed, stage and step."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training.ablate import variants
from training.config import Config
from training.data import cached_people
from training.files import DataError
from training.synthetic.__main__ import write_set
from training.synthetic.studio import Studio
from training.train import Run, steps_of
from training.trainer import Place

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[3] / "training/configs"
STAGE = {"height": 64, "crops": 64, "batch": 4, "learning_rate": 1e-3, "sigma": 1.0, "warm_up": 2}


@pytest.fixture(scope="module")
def people(assets_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_set(Studio.open(assets_folder, False, [], CPU), 4, 0, folder, 1)
    return [cached_people(folder / "rendered.json", folder / "cache", 64)]


def steps(people, assets_folder, share: float, first: int, resident: bool = False, count: int = 2):
    rendered = {"assets": assets_folder, "share": share}
    config = Config.model_validate({"seed": 1, "depth": 50, "sets": {"real": 1.0}, "stages": [STAGE], "rendered": rendered})
    nowhere = Path()
    run = Run(config, nowhere, nowhere, Place(nowhere), CPU, resident, compiled=False)
    return list(itertools.islice(steps_of(run, people, config.stages[0], 0, first), count))


def test_a_share_of_each_batch_is_rendered_by_its_step_alone(people, assets_folder):
    first, second = steps(people, assets_folder, 0.5, 0)
    assert [tuple(each.shape) for each in first] == [(4, 64, 48, 3), (4, 17, 2), (4, 17), (4, 0, 0, 0)]
    (again,) = steps(people, assets_folder, 0.5, 1, count=1)
    for ours, same in zip(second, again, strict=True):
        torch.testing.assert_close(ours, same, rtol=0, atol=0)
    assert (first[0][2:] != second[0][2:]).any()
    nobody = [replace(each, weights=np.zeros_like(each.weights)) for each in people]
    (step,) = steps(nobody, assets_folder, 0.5, 0, count=1)
    assert (step[2].sum(1) > 0).tolist() == [False, False, True, True]


def test_all_of_a_batch_may_be_rendered_and_crops_may_be_made_on_the_device(people, assets_folder):
    (by_opencv,) = steps(people, assets_folder, 1.0, 0, count=1)
    (there,) = steps(people, assets_folder, 1.0, 0, resident=True, count=1)
    torch.testing.assert_close(by_opencv[1], there[1], rtol=0, atol=0)
    assert (by_opencv[0].dtype, there[0].dtype) == (torch.uint8, torch.float32)
    assert (by_opencv[0].float() - there[0].float()).abs().mean() < 3


def test_missing_assets_end_a_run_with_their_name(people, tmp_path):
    with pytest.raises(DataError, match=r"anny_compact\.npz cannot be read"):
        steps(people, tmp_path, 0.5, 0)


def test_the_runs_of_the_comparison_have_one_budget():
    runs = variants(CONFIGS / "ablations-synthetic.toml")
    assert runs[0].name == "real only"
    assert len({sum(stage.crops for stage in run.config.stages) for run in runs}) == 1
    synthetic = next(run for run in runs if run.name == "synthetic only")
    assert {name for name, share in synthetic.config.sets.items() if share} == {"rendered"}
    assert runs[0].config.sets["rendered"] == 0
