"""The mean of trained weights, which is often better than each of them (model soups, arXiv 2203.05482).

`python -m training.mean FIRST.pth SECOND.pth … --out MEAN.pth`: of networks that come from one another, or from the same one.
Others have nothing in common, and their mean finds nobody. A file given twice counts twice.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from training.command import one_line_faults
from training.files import DataError
from training.weights import check_table, read_checked, write_content


def mean_weights(files: list[Path]) -> dict[str, Tensor]:
    """The mean of weights and running statistics in files of one network; counts are the first one's. Raises DataError."""
    first, *others = (_tensors_in(file) for file in files)
    for file, weights in zip(files[1:], others, strict=True):
        other = {key for key in first.keys() | weights.keys() if _shape(first, key) != _shape(weights, key)}
        if other:
            raise DataError(f"{file} is of another network than {files[0]}: {len(other)} tensors differ, {min(other)} is one")
    return {
        key: torch.stack([value, *(weights[key] for weights in others)]).mean(dim=0) if value.is_floating_point() else value
        for key, value in first.items()
    }


def _tensors_in(file: Path) -> dict[str, Tensor]:
    weights = read_checked(file, check_table, "holds no weights")
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def _shape(weights: dict[str, Tensor], key: str) -> torch.Size | None:
    return weights[key].shape if key in weights else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.mean", description="Write the mean of trained weights.")
    parser.add_argument("weights", type=Path, nargs="+", help="weights.pth of runs, or of stored models")
    parser.add_argument("--out", type=Path, required=True, help="the mean, to be exported like any weights.pth")
    arguments = parser.parse_args()
    with one_line_faults():
        write_content(arguments.out, mean_weights(arguments.weights))


if __name__ == "__main__":
    main()
