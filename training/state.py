"""A training run at one step, and the file that it goes on from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.config import Config
from training.files import DataError
from training.lpn import LPN
from training.weights import check_weights, read_content, read_lpn, write_content


@dataclass(slots=True)
class State:
    """A run at one step; `averaged` is the moving average of the weights, which is what is kept in the end."""

    model: LPN
    averaged: LPN
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0


def new_state(config: Config, device: torch.device, start: Path | None) -> State:
    """A run at its beginning, from the weights in the file `start` or from scratch. Raises DataError."""
    model = (
        LPN(config.depth, attention=config.attention) if start is None else read_lpn(start, config.depth, config.attention)
    )
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = LPN(config.depth, attention=config.attention).to(device)
    averaged.load_state_dict(model.state_dict())
    return State(model, averaged.requires_grad_(False), new_optimizer(model))


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that does not decay norms and biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


def save(state: State, file: Path) -> None:
    """Write the checkpoint. Raises DataError; what was there before stays then."""
    content = {"stage": state.stage, "step": state.step, "optimizer": state.optimizer.state_dict()}
    content |= {"model": state.model.state_dict(), "averaged": state.averaged.state_dict()}
    write_content(file, content)


def resume(state: State, file: Path, config: Config) -> None:
    """Go on from a checkpoint. Raises DataError where the file is damaged or of another run."""
    try:
        content = read_content(file)
        if not isinstance(content, dict) or content.keys() != {"stage", "step", "optimizer", "model", "averaged"}:
            raise ValueError("it is no checkpoint of a run")  # noqa: TRY301
        depth = check_weights(content["model"], config.attention)
        if depth != config.depth:
            raise ValueError(f"it is of an LPN-{depth}, and the config asks for an LPN-{config.depth}")  # noqa: TRY301
        if content["stage"] > len(config.stages):
            raise ValueError(f"it is in stage {content['stage']}, and the config has {len(config.stages)}")  # noqa: TRY301
    except ValueError as error:
        raise DataError(f"{file} cannot be gone on from: {error}") from error
    state.model.load_state_dict(content["model"])
    state.averaged.load_state_dict(content["averaged"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.stage, state.step = content["stage"], content["step"]


def finished_weights(state: State) -> dict[str, Tensor]:
    """What a run gives in the end, on the CPU."""
    return {name: value.cpu() for name, value in state.averaged.state_dict().items()}
