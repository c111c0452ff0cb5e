"""The mean of trained weights, which is often better than each of them (model soups, arXiv 2203.05482).

`python -m training.mean FIRST.pth SECOND.pth … --out MEAN.pth`: of LPNs that come from one another, or from the same one.
Others have nothing in common, and their mean finds nobody.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from training.command import one_line_faults
from training.files import DataError
from training.lpn import depth_of
from training.weights import read_lpn, write_content


def mean_weights(files: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights and running statistics in files of one depth; counts are the first one's. Raises DataError."""
    first, *others = (read_lpn(file).state_dict() for file in files)
    for file, weights in zip(files[1:], others, strict=True):
        if depth_of(weights) != depth_of(first):
            raise DataError(f"{file} is of an LPN-{depth_of(weights)}, and {files[0]} of an LPN-{depth_of(first)}")
    return {
        key: torch.stack([value, *(weights[key] for weights in others)]).mean(dim=0) if value.is_floating_point() else value
        for key, value in first.items()
    }


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
