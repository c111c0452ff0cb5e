"""What the trainers of both networks do alike: the command line, stage after stage, reports, checks and checkpoints."""

import argparse
import copy
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from training.files import DataError, make_folder
from training.schedule import averaging, learning_rate, write_line
from training.state import Network, State, resume, save
from training.weights import write_content

log = logging.getLogger("training")

STOPPED = "stopped before its end; the same command goes on"

_CHECKPOINT_SECONDS = 240
_CHECK_SECONDS = 1200  # checks took 9 % of the time on a slow CPU, once every checkpoint
_REPORT_SECONDS = 30

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of a run, and when it is to stop: at `until` on the monotonic clock, or when `stopped` is set."""

    folder: Path
    until: float = float("inf")
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        """Whether the run is to stop now."""
        return self.stopped.is_set() or time.monotonic() > self.until

    @property
    def checkpoint(self) -> Path:
        """The file that the run goes on from."""
        return self.folder / "checkpoint.pth"


@dataclass(frozen=True, slots=True)
class Plan(Generic[Batch]):
    """One stage, from the step on that the run is at.

    `losses` gives those of a batch by name, whose sum is made small; `check` gives figures on dev people, by name.
    """

    steps: int
    batch: int  # pictures in one
    warm_up: int  # steps, half of the stage's at most
    peak: float  # of the learning rate; a group of the optimizer with a `share` gets that part of it
    kept: float  # of the averaged weights, a step
    batches: Iterator[Batch]
    losses: Callable[[Batch], dict[str, Tensor]]
    check: Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Trainer(Generic[Network, Batch]):
    """How one kind of network is trained.

    `plan` gives the rest of the stage that a run is in, `groups` the parameters for a stage's optimizer, `check_weights`
    raises ValueError for weights of another network; `unit` is what the log counts. `config` has a list of the stages.
    """

    stages: int
    config: BaseModel
    plan: Callable[[State[Network]], Plan[Batch]]
    groups: Callable[[Network, int], list[dict[str, Any]]]
    check_weights: Callable[[Any], None]
    unit: str

    def train(self, model: Network, device: torch.device, place: Place) -> bool:
        """Train until the last stage ends or the run is to stop; True when all is done.

        Goes on from the folder's checkpoint if there is one. Writes log.jsonl, checkpoint.pth and at the end weights.pth.
        Raises DataError.
        """
        make_folder(place.folder)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        state = State(model, copy.deepcopy(model).requires_grad_(False), self._optimizer(model, 0))
        if place.checkpoint.exists():
            resume(state, place.checkpoint, self.stages, self.check_weights, self._is_of)
            if not state.step:  # it was made for a stage that there was not yet, perhaps
                state.optimizer = self._optimizer(state.model, state.stage)
            log.info("resumed at stage %d, step %d", state.stage, state.step)
        while state.stage < self.stages:
            if not self._train_stage(state, place):
                return False
            state.stage, state.step = state.stage + 1, 0
            state.model.load_state_dict(state.averaged.state_dict())
            state.optimizer = self._optimizer(state.model, state.stage)
            self._save(state, place)
        write_content(place.folder / "weights.pth", state.finished_weights())
        log.info("done: %s", place.folder / "weights.pth")
        return True

    def _optimizer(self, model: Network, stage: int) -> torch.optim.Optimizer:
        """A stage's; after the last one, when it is only saved, that one's. Each step sets the learning rate."""
        return torch.optim.AdamW(self.groups(model, min(stage, self.stages - 1)), lr=1e-3, fused=True)

    def _config_of(self, begun: int) -> str:
        """What a run is made by that has begun so many stages; those after them may still change."""
        told = self.config.model_dump(mode="json")
        return json.dumps(told | {"stages": told["stages"][:begun]})

    def _is_of(self, written: str, begun: int) -> bool:
        """Whether that is `_config_of` it; keys that configs have got since then have their defaults in it."""
        told, stages = json.loads(written), self.config.model_dump(mode="json")["stages"]
        if len(told["stages"]) != begun:
            return False
        try:
            return type(self.config).model_validate(told | {"stages": told["stages"] + stages[begun:]}) == self.config
        except ValidationError:
            return False

    def _save(self, state: State[Network], place: Place) -> None:
        save(state, place.checkpoint, self._config_of(state.stage + (state.step > 0)))

    def _train_stage(self, state: State[Network], place: Place) -> bool:
        plan = self.plan(state)
        state.model.train()
        average = averaging(state.averaged, state.model)
        losses: list[dict[str, Tensor]] = []
        saved = reported = checked = time.monotonic()
        first_reported = state.step
        while state.step < plan.steps:
            losses.append(_step(state, plan))
            average(min(plan.kept, (1 + state.step) / (10 + state.step)))
            now, over = time.monotonic(), place.over
            if now - reported > _REPORT_SECONDS:
                rate = (state.step - first_reported) * plan.batch / (now - reported)
                left = (plan.steps - state.step) * plan.batch / rate / 60
                means = {name: round(float(torch.stack([each[name] for each in losses]).mean()), 4) for name in losses[0]}
                line = {"stage": state.stage, "step": state.step, "of": plan.steps, **means}
                write_line(place.folder, line | {f"{self.unit}_per_second": round(rate, 1), "minutes_left": round(left, 1)})
                losses, reported, first_reported = [], now, state.step
            ends = over or state.step == plan.steps
            if now - saved > _CHECKPOINT_SECONDS or ends:
                _check_numbers(state, place)
                self._save(state, place)
                if now - checked > _CHECK_SECONDS or ends:
                    write_line(place.folder, {"stage": state.stage, "step": state.step, **plan.check()})
                    checked = time.monotonic()
                saved = reported = time.monotonic()
                losses, first_reported = [], state.step
                if over and state.step < plan.steps:
                    return False
        return True


def _step(state: State[Network], plan: Plan[Batch]) -> dict[str, Tensor]:
    """One step of the optimizer; gives the losses."""
    rate = learning_rate(plan.peak, min(plan.warm_up, plan.steps // 2), state.step, plan.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    losses = plan.losses(next(plan.batches))
    state.optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(state.model.parameters(), 10.0)
    state.optimizer.step()
    state.step += 1
    return {name: loss.detach() for name, loss in losses.items()}


def _check_numbers(state: State[Network], place: Place) -> None:
    """Raise DataError where the weights are no numbers any more, before they take the last checkpoint's place."""
    if not all(bool(parameter.isfinite().all()) for parameter in state.model.parameters()):
        raise DataError(
            f"{place.folder}: in stage {state.stage} the weights are no numbers any more at step {state.step}; "
            f"{place.checkpoint.name}, if there is one, is from before; a lower learning rate may help"
        )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The argument that says on what to compute."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_usable_device, default=device, help="cpu or cuda")


def _usable_device(text: str) -> torch.device:
    """A command line's device that PyTorch has here. Raises argparse.ArgumentTypeError."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no device that PyTorch has here; cpu is") from error
    return device


def training_parser(program: str, description: str, cache: str) -> argparse.ArgumentParser:
    """A parser of the arguments that every training takes; `cache` is where it keeps what it has decoded."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets that the config names")
    parser.add_argument("--cache", type=Path, default=Path(cache), help="where decoded pictures are kept")
    parser.add_argument("--start", type=Path, help="weights.pth of a run or of the store to start from, instead of scratch")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    add_device(parser)
    return parser


def place_of(folder: Path, minutes: float | None, start: Path | None = None) -> Place:
    """A run in a folder that stops after so many minutes, on SIGTERM or on Ctrl-C; at the second one at once. One that has
    begun does not begin from `start` again, which the log tells."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            sys.exit(1)
        stopped.set()
        log.info("stopping after this step, with a checkpoint; once more stops at once, without")

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, stop)
    place = Place(folder, float("inf") if minutes is None else time.monotonic() + 60 * minutes, stopped)
    if start is not None and place.checkpoint.exists():
        log.warning("--start %s is passed over: the run has begun, and goes on from %s", start, place.checkpoint)
    return place


def prepare_training(device: torch.device) -> None:
    """Log to standard error; OpenCV in one thread, for pictures are made in threads; a GPU at its quickest."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cv2.setNumThreads(1)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
