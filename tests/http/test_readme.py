"""The commands and programs of README.md and app/README.md, run as written but for the service's address and the camera."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "app/README.md"))
BLOCKS = re.findall(r"^ *```(\w+)\n(.*?)^ *```", PAGES, re.MULTILINE | re.DOTALL)
CURL = [block.strip() for kind, block in BLOCKS if kind == "bash" and "curl " in block]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


@pytest.fixture
def run(service, tmp_path):
    """Run a command in a folder that has the tests' data, and give what it prints."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")

    def run(command: list[str]) -> str:
        here = [word.replace("localhost:8000", f"127.0.0.1:{service.port}") for word in command]
        done = subprocess.run(here, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", CURL)
def test_a_curl_command_of_the_pages_is_answered(run, tmp_path, command):
    told = run(["bash", "-o", "pipefail", "-c", command])
    if "-o skeletons.jpg" in command:
        assert (tmp_path / "skeletons.jpg").read_bytes().startswith(b"\xff\xd8\xff")
    else:
        answer = json.loads(told)
        assert answer if isinstance(answer, list) else answer["annotations"]


def test_the_pages_hold_the_commands_and_programs_that_are_run_here():
    assert (len(CURL), len(PYTHON)) == (5, 3)


@pytest.mark.parametrize("program", PYTHON)
def test_a_program_of_the_pages_prints_keypoints(run, program):
    photo = "tests/data/photos/t_pose_cc0.jpg"
    told = run([sys.executable, "-c", program.replace("VideoCapture(0)", f"VideoCapture({photo!r})")])
    assert len(re.findall(r"\d+\.\d+", told)) >= 3
