"""The authors' checkpoint → a model of the store.

`python -m training.import_reference lpn_50_256x192.pth --name lpn50-authors --version 1`
"""

import argparse
import logging
import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor

from app.inference.model_store import ModelError
from training.export import add_store_arguments, export
from training.lpn import LPN, depth_of


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of the authors. Raises ValueError that says in one line why the file is none."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    except (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError("PyTorch finds no weights in it") from error
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise ValueError("it is no table of named tensors")
    depth = depth_of(weights)
    expected = LPN(depth).state_dict()
    missing, strange = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or strange:
        example = min(missing or strange)
        raise ValueError(f"of an LPN-{depth}, {len(missing)} tensors are missing and {len(strange)} are strange: {example}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(weights[name].shape)} and not {list(tensor.shape)}")
    return weights


def main() -> int:
    """The command line: 0, or 1 with one line that says why there is no model."""
    parser = argparse.ArgumentParser(
        prog="python -m training.import_reference", description="Make a model of the store from the authors' checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, help="lpn_50_256x192.pth, lpn_101_256x192.pth or lpn_152_256x192.pth")
    add_store_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        weights = read_checkpoint(arguments.checkpoint)
    except ValueError as error:
        print(f"{arguments.checkpoint.name} is not a checkpoint of the authors: {error}", file=sys.stderr)
        return 1
    try:
        export(weights, arguments.store, arguments.name, arguments.version, quarter_shift=True)
    except ModelError as error:
        print(f"{arguments.checkpoint.name} makes no model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
