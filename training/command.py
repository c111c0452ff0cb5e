"""What the command lines of measurements have in common."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from app.inference.model_store import ModelError, stored_models
from app.inference.pose import PoseModel
from training.files import DataError
from training.keypoints import NAMES


def measuring_parser(program: str, description: str, model: str) -> argparse.ArgumentParser:
    """A parser of the arguments that every measurement of a stored model takes."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--model", default=model, help="name or name/version")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    return parser


def positive(text: str) -> int:
    """A command line's number of at least 1. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def file_to_write(text: str) -> Path:
    """A command line's file that is written at the end of the work, in a folder that takes it. Raises
    argparse.ArgumentTypeError."""
    file = Path(text)
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{file.parent} is no folder that can be written to")
    return file


def new_set_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a command that writes people of one set as another, which does not take the first one's place."""
    parser.add_argument("--annotations", type=Path, required=True, help="a COCO keypoint file beside its pictures")
    parser.add_argument("--out", type=file_to_write, required=True, help="the new set, beside the same pictures")
    arguments = parser.parse_args()
    if arguments.out.resolve() == arguments.annotations.resolve():
        parser.error("--out is the file that is read")
    return arguments


def model_folder(store: Path, wanted: str) -> Path:
    """The folder of a model by name (its newest version) or name/version. Raises SystemExit."""
    for folder in reversed(stored_models(store)):
        if wanted in (folder.parent.name, f"{folder.parent.name}/{folder.name}"):
            return folder
    raise SystemExit(f"there is no model {wanted} in {store}")


def coco_model(folder: Path) -> PoseModel:
    """The pose model in a folder, whose joints are COCO's, as the labels are. Raises ModelError."""
    model = PoseModel.load(folder)
    if model.description.keypoints.names != NAMES:
        raise ModelError(f"{model.description.id} knows other joints than COCO's 17, by which people are labelled")
    return model


@contextlib.contextmanager
def one_line_faults() -> Iterator[None]:
    """End the program with one line where a file or a model is at fault, and without one by Ctrl-C."""
    try:
        yield
    except (DataError, ModelError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells tell of SIGINT
