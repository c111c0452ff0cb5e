"""What every test of the training needs."""

import signal
from pathlib import Path

import pytest

from training.export import main as export

_STORED = Path(__file__).parents[2] / "model_store/lpn50/1"
_REFERENCE = Path(__file__).parents[1] / "data/reference"


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A training takes SIGTERM and Ctrl-C; pytest gets them back."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A model in float32 of the shipped weights, by the command."""
    store = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patched:
        command = ["export", str(_STORED / "weights.pth"), "--name", "x", "--version", "1", "--store", str(store)]
        patched.setattr("sys.argv", command)
        export()
    return store / "x/1"


@pytest.fixture(scope="session")
def reference_people(tmp_path_factory):
    """The COCO file of the reference photos' people, beside the photos."""
    folder = tmp_path_factory.mktemp("people")
    for number, photo in enumerate(("astronaut_384.png", "camera_400.png", "drawing_560x360.png"), 1):
        (folder / f"{number:012d}.jpg").write_bytes((_REFERENCE / photo).read_bytes())
    people = folder / "people.json"
    people.write_bytes((_REFERENCE / "annotations_mini.json").read_bytes())
    return people
