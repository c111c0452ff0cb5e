"""The authors' checkpoint → a model of the store.

`python -m training.import_reference lpn_50_256x192.pth --name lpn50-authors --version 1`
"""

import argparse
import logging
import sys
from pathlib import Path

from app.inference.model_store import ModelError
from training.decoders import AUTHORS
from training.export import add_store_arguments, export
from training.files import DataError
from training.weights import check_weights, read_content


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
        weights = read_content(arguments.checkpoint)
        check_weights(weights)
    except ValueError as error:
        print(f"{arguments.checkpoint.name} is not a checkpoint of the authors: {error}", file=sys.stderr)
        return 1
    try:
        export(weights, arguments.store, arguments.name, arguments.version, AUTHORS, arguments.int8)
    except (ModelError, DataError) as error:
        print(f"{arguments.checkpoint.name} makes no model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
