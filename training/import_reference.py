"""The authors' checkpoint → a model of the store.

`python -m training.import_reference lpn_50_256x192.pth --name lpn50-authors --version 1`
"""

import argparse
import logging
import pickle
import sys
from pathlib import Path

import torch

from training.export import export


def main() -> int:
    """The command line: 0, or 1 with one line that says why the file is not a checkpoint of the authors."""
    parser = argparse.ArgumentParser(
        prog="python -m training.import_reference", description="Make a model of the store from the authors' checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, help="lpn_50_256x192.pth, lpn_101_256x192.pth or lpn_152_256x192.pth")
    parser.add_argument("--name", required=True, help="of the model, for example lpn50-authors")
    parser.add_argument("--version", required=True, help="a whole number")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        weights = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
        export(weights, arguments.store, arguments.name, arguments.version, quarter_shift=True)
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{arguments.checkpoint.name} is not a checkpoint of the authors: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
