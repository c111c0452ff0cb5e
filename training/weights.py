"""Weights in a file, and what is wrong with files that hold none."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.files import DataError, write_whole
from training.lpn import LPN, Depth, depth_of

_UNREADABLE = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError)


def read_content(file: Path) -> Any:
    """What PyTorch finds in a file. Raises ValueError that says in one line why there is nothing."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise ValueError("PyTorch finds no weights in it, or other things than tensors beside them") from error
    except _UNREADABLE as error:
        raise ValueError("PyTorch finds no weights in it") from error


def read_checked(file: Path, check: Callable[[Any], object], fault: str = "holds no weights that fit") -> Any:
    """What PyTorch finds in a file and `check` lets pass. Raises DataError, where `check` raises ValueError too."""
    try:
        content = read_content(file)
        check(content)
    except ValueError as error:
        raise DataError(f"{file} {fault}: {error}") from error
    return content


def write_content(file: Path, content: Any) -> None:
    """Write tensors for torch.load, wholly or not at all. Raises DataError."""
    out = io.BytesIO()
    torch.save(content, out)
    write_whole(file, out.getvalue())


def check_weights(weights: Any, attention: bool = True) -> Depth:
    """The depth of the LPN whose weights these are. Raises ValueError that says in one line why they are none."""
    check_table(weights)
    depth = depth_of(weights)
    check_tensors(weights, LPN(depth, attention=attention), f"an LPN-{depth}")
    return depth


def check_tensors(weights: Any, network: nn.Module, name: str) -> None:
    """Raise ValueError that says in one line why these are not the weights of a network, which `name` names."""
    check_table(weights)
    expected = network.state_dict()
    missing, strange = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or strange:
        example = min(missing or strange)
        raise ValueError(f"of {name}, {len(missing)} tensors are missing and {len(strange)} are strange: {example}")
    for key, tensor in expected.items():
        if weights[key].shape != tensor.shape:
            raise ValueError(f"{key} has the shape {list(weights[key].shape)} and not {list(tensor.shape)}")


def check_table(weights: Any) -> None:
    """Raise ValueError if these are no tensors by their names."""
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise ValueError("it is no table of named tensors")


def read_lpn(file: Path, depth: Depth | None = None, attention: bool = True) -> LPN:
    """The LPN, of `depth` if given, with the weights in a file. Raises DataError that names the file and the fault."""

    def check(weights: Any) -> None:
        found = check_weights(weights, attention)
        if depth not in (None, found):
            raise ValueError(f"they are of an LPN-{found}, and an LPN-{depth} is asked for")

    weights = read_checked(file, check)
    model = LPN(depth_of(weights), attention=attention)
    model.load_state_dict(weights)
    return model
