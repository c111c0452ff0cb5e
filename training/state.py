"""A training run at one step, and the file that it goes on from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from training.weights import read_checked, write_content

Network = TypeVar("Network", bound=nn.Module)


@dataclass(slots=True)
class State(Generic[Network]):
    """A run at one step; `averaged` is the moving average of the weights, which is what is kept in the end."""

    model: Network
    averaged: Network
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0

    def finished_weights(self) -> dict[str, Tensor]:
        """What the run gives in the end, on the CPU."""
        return {name: value.cpu().contiguous() for name, value in self.averaged.state_dict().items()}


def save(state: State[Network], file: Path, config: str) -> None:
    """Write the checkpoint of a run that `config` has made what it is. Raises DataError; what was there before stays then."""
    content = {"stage": state.stage, "step": state.step, "optimizer": state.optimizer.state_dict(), "config": config}
    content |= {"model": state.model.state_dict(), "averaged": state.averaged.state_dict()}
    write_content(file, content)


def resume(
    state: State[Network], file: Path, stages: int, check: Callable[[Any], None], made_by: Callable[[str, int], bool]
) -> None:
    """Go on from a checkpoint of a run of so many stages; `made_by` tells whether the first of them are of a config.

    `check` raises ValueError for weights that are not the network's. Raises DataError where the file is damaged or of another
    run.
    """

    def fits(content: Any) -> None:
        named = {"stage", "step", "optimizer", "model", "averaged", "config"}
        if not isinstance(content, dict) or content.keys() != named:
            raise ValueError("it is no checkpoint of a run")
        check(content["model"])
        if content["stage"] > stages:
            raise ValueError(f"it is in stage {content['stage']}, and the config has {stages}")
        if not made_by(content["config"], content["stage"] + (content["step"] > 0)):
            raise ValueError("it is of another config, as far as this run has come; give another --run")

    content = read_checked(file, fits, "cannot be gone on from")
    state.model.load_state_dict(content["model"])
    state.averaged.load_state_dict(content["averaged"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.stage, state.step = content["stage"], content["step"]
