"""The authors' checkpoint → a model of the store.

`python -m training.import_reference lpn_50_256x192.pth --name lpn50-authors --version 1`
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from app.inference.model_store import ModelError
from training.decoders import AUTHORS
from training.export import add_store_arguments, export
from training.files import DataError
from training.weights import check_weights, read_content


def weights_in(content: Any) -> Any:
    """The weights of a checkpoint that a training of theirs wrote beside other things, on several GPUs or with a profiler."""
    if isinstance(content, dict):
        content = content.get("best_state_dict", content.get("state_dict", content))
    if not isinstance(content, dict):
        return content
    named = {str(name).removeprefix("module."): values for name, values in content.items()}
    return {name: values for name, values in named.items() if name.rpartition(".")[2] not in ("total_ops", "total_params")}


def main() -> int:
    """The command line: 0, or 1 with one line that says why there is no model."""
    parser = argparse.ArgumentParser(
        prog="python -m training.import_reference", description="Make a model of the store from the authors' checkpoint."
    )
    published = "lpn_50_256x192.pth, lpn_101_256x192.pth or lpn_152_256x192.pth"
    parser.add_argument("checkpoint", type=Path, help=f"{published}; of a training of one's own, model_best.pth")
    add_store_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        weights = weights_in(read_content(arguments.checkpoint))
        check_weights(weights)
    except ValueError as error:
        print(f"{arguments.checkpoint.name} is no checkpoint of COCO's 17 joints by the authors: {error}", file=sys.stderr)
        return 1
    try:
        export(weights, arguments.store, arguments.name, arguments.version, AUTHORS, arguments.int8)
    except (ModelError, DataError) as error:
        print(f"{arguments.checkpoint.name} makes no model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
