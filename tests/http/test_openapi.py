"""The OpenAPI document is what the service does: schemathesis makes requests of it and judges the answers by it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "schemathesis"


def test_whatever_the_document_allows_or_forbids_is_answered_as_it_says(service, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", FOLDER / "schemathesis.toml", "run"]
    options = ["--phases", "coverage,fuzzing", "--max-examples", "200", "--seed", "15"]
    ended = subprocess.run(
        [*command, f"{service.client.base_url}/openapi.json", *options, "--continue-on-failure", "--no-color"],
        cwd=tmp_path,  # it leaves a cache
        env=os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"},  # where its hooks lie, and what they use
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "6 selected / 6 total" in ended.stdout
    assert "Traceback" not in service.log
