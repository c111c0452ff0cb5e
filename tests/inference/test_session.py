"""The one thread rule: cores are counted by affinity and by the cgroup's quota, of either version."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.inference.detector import Detector
from app.inference.model_store import load_model
from app.inference.pose import PoseModel
from app.inference.session import own_cgroup, throttled_seconds, usable_cores, usable_memory

STORE = Path(__file__).parents[2] / "model_store"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("900000 50000", 8),
    ],
)
def test_the_quota_of_cgroup_v2_counts(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3), ("250000", 3), ("10000", 1)])
def test_the_quota_of_cgroup_v1_counts(tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize("content", ["", "max", "1 2 3"])
def test_a_quota_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "cpu.max").write_text(content)
    assert usable_cores(tmp_path) == 8


def test_the_limits_of_the_cgroups_that_hold_a_cgroup_count(tmp_path):
    inner = tmp_path / "system.slice/pose.service"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("400000 100000")
    (inner / "memory.max").write_text("max")
    (inner.parent / "cpu.max").write_text("300000 100000")
    (inner.parent / "memory.max").write_text("1000000")
    assert usable_cores(inner) == 3
    assert usable_memory(inner) == 1_000_000


@pytest.mark.parametrize(
    ("told", "folder"),
    [
        ("0::/\n", "."),  # in a container
        ("0::/system.slice/pose.service\n", "system.slice/pose.service"),
        ("0::/of/another/namespace\n", "."),
        ("4:cpu,cpuacct:/user\n1:name=systemd:/user\n", "."),  # v1
    ],
)
def test_outside_of_a_container_a_process_is_told_its_cgroup(tmp_path, told, folder):
    (tmp_path / "system.slice/pose.service").mkdir(parents=True)
    (tmp_path / "told").write_text(told)
    assert own_cgroup(tmp_path, tmp_path / "told") == tmp_path / folder
    assert own_cgroup(tmp_path, tmp_path / "nowhere") == tmp_path


def test_without_a_cgroup_the_affinity_counts(tmp_path, monkeypatch):
    assert usable_cores(tmp_path / "nowhere") == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cores(tmp_path / "nowhere") == 1


@pytest.mark.parametrize(
    ("lanes", "cores", "helpers"), [(1, 8, 0), (8, 1, 0), (3, 8, 3 * 2), (9, 8, 3 * 3)]
)  # of three networks
def test_libraries_open_pools_for_what_is_alone_only(lanes, cores, helpers):
    program = (
        "import os, app.__main__\n"
        f"os.sched_getaffinity = lambda _: set(range({cores}))\n"
        "from app.inference.pipeline import Pipeline\n"
        "from app.settings import Settings\n"
        "from app.telemetry.metrics import Metrics\n"
        "import cv2, numpy as np\n"
        "cv2.setNumThreads(4)\n"  # however few cores there are
        f"model = Pipeline(Settings(lanes={lanes}), Metrics()).models.find(None)\n"
        "model.plain.run(np.zeros((2, 256, 192, 3), np.uint8))\n"
        "cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (4000, 4000)), np.ones((500, 500)) @ np.ones((500, 500))\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted by /proc")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    counted = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert counted.stdout == f"{1 + helpers}\n", counted.stderr


def test_what_quotas_of_the_cgroups_above_have_throttled_counts(tmp_path):
    (tmp_path / "slice/service").mkdir(parents=True)
    for folder, microseconds in (("slice", 7_000_000), ("slice/service", 500_000)):
        (tmp_path / folder / "cpu.stat").write_text(f"usage_usec 5\nthrottled_usec {microseconds}\n")
    assert throttled_seconds(tmp_path / "slice/service") == 7.5


def test_throttled_time_is_read_from_either_kind_of_cgroup(tmp_path):
    assert throttled_seconds(tmp_path) == 0
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.stat").write_text("nr_periods 9\nnr_throttled 3\nthrottled_time 2500000000\n")
    assert throttled_seconds(tmp_path) == 2.5
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nnr_throttled 1\nthrottled_usec 1500000\n")
    assert throttled_seconds(tmp_path) == 1.5
    (tmp_path / "cpu.stat").write_text("no table")
    assert throttled_seconds(tmp_path) == 2.5


def test_the_memory_limit_of_either_kind_of_cgroup_counts_up_to_the_machines(tmp_path):
    machine = usable_memory(tmp_path / "nowhere")
    assert machine > 2**20
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")  # none, in cgroup v1
    assert usable_memory(tmp_path) == machine
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1048576\n")
    assert usable_memory(tmp_path) == 2**20
    (tmp_path / "memory.max").write_text("524288\n")
    assert usable_memory(tmp_path) == 2**19


def test_no_limit_of_cgroup_v2_is_the_machines_memory(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory(tmp_path) == usable_memory(tmp_path / "nowhere")


@pytest.mark.parametrize("module", ["app.inference.session", "loadtests.graphs", "loadtests.peers.work", "training.int8"])
def test_onnx_runtime_tells_nobody_of_us(tmp_path, module):
    """Where it did, it would leave the name it gave this machine under the home folder."""
    environment = {name: value for name, value in os.environ.items() if not re.match("CI$|ORT_|GITHUB_|XDG_", name)}
    root = Path(__file__).parents[2]
    model = "pathlib.Path('model_store/lpn50/1/model.onnx').read_bytes()"
    open_it = f"import pathlib, {module}, app.inference.session as session; session.open_session({model})"
    ran = subprocess.run(
        [sys.executable, "-c", open_it], cwd=root, env=environment | {"HOME": str(tmp_path)}, capture_output=True
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["lpn50/1", "person-det/1"])
def test_several_threads_give_what_one_gives(name):
    stored = load_model(STORE / name)
    shape = stored.description.input
    crop = np.random.default_rng(0).integers(0, 256, (1, shape.height, shape.width, 3), np.uint8)
    if name == "lpn50/1":
        model = PoseModel.opened(stored, 3)
        networks = [model.plain, model.with_flip_test]
    else:
        networks = [Detector.opened(stored, 10, 3).network]
    for network in networks:
        np.testing.assert_allclose(network.alone(crop).values, network.run(crop).values, atol=1e-4)


def test_one_thread_has_no_second_session():
    assert PoseModel.opened(load_model(STORE / "lpn50/1")).plain.alone is None
