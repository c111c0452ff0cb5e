"""scripts/environment, beside requirements of nothing, which need no network."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A folder with scripts/environment and a set of no packages."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "requirements").mkdir()
    shutil.copy(ROOT / "scripts/environment", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "requirements/service.txt").write_text("# nothing\n")
    return tmp_path


def environment(project, python=sys.executable):
    ran = subprocess.run(
        ["scripts/environment", "service"],
        cwd=project,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return ran.returncode, ran.stdout + ran.stderr


def python_of(project, *version):
    """A Python that says that it is of that version."""
    file = project / "python"
    lie = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    told = ".".join(map(str, version))
    file.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python {told} || exec {sys.executable} -c "{lie}" "$2"\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 15, 0)])
def test_a_python_that_the_packages_are_not_made_for_is_told(project, version):
    code, said = environment(project, python_of(project, *version))
    assert code == 1
    assert said.startswith(f"Python 3.11 to 3.14 is needed; Python {'.'.join(map(str, version))} was found. Name another one")
    assert said.count("\n") == 1
    assert not (project / ".venv").exists()


def test_no_python_is_told(project):
    code, said = environment(project, project / "nowhere/python3")
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("Python 3.11 to 3.14 is needed; none was found.")


def test_an_environment_whose_python_became_another_is_made_anew(project):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True
    )  # its packages are not found
    shutil.copy(project / "requirements/service.txt", project / ".venv")
    code, said = environment(project)
    assert (code, said.splitlines()[0]) == (
        0,
        "Installing the locked dependencies into .venv; the first time this takes some minutes.",
    )
    subprocess.run([project / ".venv/bin/python", "-c", "import pip"], check=True)
    assert environment(project, python_of(project, 3, 15, 0)) == (0, "")  # one that is whole needs no other Python


def test_a_larger_set_holds_the_smaller(project):
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").symlink_to(sys.executable)
    (project / "requirements/test.txt").write_text("# nothing more\n")
    (project / ".venv/test.txt").write_text("# nothing more\n")
    assert environment(project) == (0, "")
    (project / ".venv/test.txt").write_text("# another version\n")
    assert environment(project)[1].startswith("Installing the locked dependencies")
