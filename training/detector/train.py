"""Train the person detector: `python -m training.detector.train CONFIG.toml --data DATA --run DIR --imagenet FILE`.

As training.train: stages one after the other, each from the averaged weights of the one before; everything is drawn from
(seed, stage, step), and the run folder holds the last checkpoint, which SIGTERM and Ctrl-C write too.
"""

import argparse
import logging
import signal
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from training.detector.augment import Batch, Variation, augmented_batch
from training.detector.data import Photos, cached_photos
from training.detector.loss import detection_loss
from training.detector.network import PersonDetector, cells, normalised
from training.files import DataError, whole_file
from training.schedule import average, learning_rate, one_ahead, write_line

log = logging.getLogger("training")

SIDE = 416  # the longest side of a photo as served
_CHECKPOINT_SECONDS = 200
_REPORT_SECONDS = 30
_CHECKED_PHOTOS = 96


class Stage(BaseModel):
    """One run of the learning-rate schedule."""

    model_config = ConfigDict(extra="forbid")

    size: int  # of the training pictures; photos are cut where they are larger
    pictures: int
    batch: int
    learning_rate: float
    scale: tuple[float, float]  # of photos, against the config's side
    mosaic: float
    sets: dict[str, float] | None = None  # instead of the config's
    backbone: float = 0.25  # its learning rate, as a share
    warm_up: int = 100  # steps
    average: float = 0.998  # of the weights, a step


class Config(BaseModel):
    """What a run depends on, beside the data."""

    model_config = ConfigDict(extra="forbid")

    seed: int
    channels: int  # of the pyramid and the heads
    sets: dict[str, float]  # folder and name of a set → how often each of its photos is drawn, relative to the others
    dev: str
    side: int = SIDE  # at which photos are cached, and at 1 of a stage's scale shown
    stages: list[Stage]

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.model_validate(tomllib.loads(file.read_text()))


@dataclass(slots=True)
class State:
    """A run at one step; `averaged` is the moving average of the weights, which is what is kept in the end."""

    model: PersonDetector
    averaged: PersonDetector
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run reads and writes, and when it is to stop: when `stopped` is set, or at `until` on the monotonic clock."""

    data: Path
    cache: Path
    run: Path
    until: float
    stopped: threading.Event

    def over(self) -> bool:
        """Whether the run is to stop now."""
        return self.stopped.is_set() or time.monotonic() > self.until


def batches(config: Config, sets: list[Photos], number: int, first: int) -> Iterator[Batch]:
    """Batches of stage `number` from step `first` on."""
    stage, seed = config.stages[number], (config.seed, number)
    shares = list((stage.sets or config.sets).values())
    variation = Variation(scale=stage.scale, mosaic=stage.mosaic)

    def make(step: int, members: list[tuple[int, int]]) -> Batch:
        return augmented_batch(sets, members, stage.size, config.side, variation, np.random.default_rng((*seed, step, 1)))

    return one_ahead(make, sets, shares, stage.batch, seed, first)


def losses(model: PersonDetector, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The losses of a batch, in bfloat16 but for the boxes."""
    with torch.autocast(device.type, torch.bfloat16):
        logits, boxes = model(normalised(torch.from_numpy(batch.pictures).to(device)))
    people, ignored = ([torch.from_numpy(places).to(device) for places in rows] for rows in (batch.people, batch.ignored))
    centres, strides = (values.to(device) for values in cells(*batch.pictures.shape[1:3]))
    return detection_loss(logits, boxes, people, ignored, centres, strides)


@torch.no_grad()
def quick_check(model: PersonDetector, photos: Photos, side: int, device: torch.device) -> dict[str, float]:
    """The losses on some photos as they would be served: a guide; training.detector.evaluate gives the figures that count."""
    still = Variation(scale=(1.0, 1.0), mosaic=0.0, rotated=0.0, stretch=0.0, colour=False)
    model.eval()
    found: list[dict[str, float]] = []
    for start in range(0, min(_CHECKED_PHOTOS, len(photos)), 16):
        members = [(0, index) for index in range(start, min(start + 16, len(photos)))]
        batch = augmented_batch([photos], members, side, side, still, np.random.default_rng(0))
        found.append({name: float(value) for name, value in losses(model, batch, device).items()})
    model.train()
    return {f"dev_{name}": float(np.mean([values[name] for values in found])) for name in found[0]}


def train(config: Config, places: Places, imagenet: Path | None, start: Path | None) -> bool:
    """Train until the last stage ends or the run is stopped; True when all is done.

    A new run starts from the backbone in the file `imagenet`, or from the whole weights in `start`, or from scratch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    places.run.mkdir(parents=True, exist_ok=True)
    model = PersonDetector(config.channels)
    if imagenet is not None:
        model.backbone.load_imagenet(imagenet)
    if start is not None:
        model.load_state_dict(torch.load(start, map_location="cpu", weights_only=True))
    averaged = PersonDetector(config.channels)
    averaged.load_state_dict(model.state_dict())
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged.to(device).requires_grad_(False)
    state = State(model, averaged, _new_optimizer(model))
    checkpoint = places.run / "checkpoint.pth"
    _resume(state, checkpoint, device)
    while state.stage < len(config.stages):
        if not _train_stage(config, state, places, device):
            return False
        state.stage, state.step = state.stage + 1, 0
        state.model.load_state_dict(state.averaged.state_dict())
        state.optimizer = _new_optimizer(state.model)
        _save(state, checkpoint)
    with whole_file(places.run / "weights.pth") as out:
        torch.save(state.averaged.state_dict(), out)
    log.info("done: %s", places.run / "weights.pth")
    return True


def _train_stage(config: Config, state: State, places: Places, device: torch.device) -> bool:
    stage = config.stages[state.stage]
    sets = [cached_photos(places.data / f"{name}.json", places.cache, config.side) for name in stage.sets or config.sets]
    dev = cached_photos(places.data / f"{config.dev}.json", places.cache, config.side)
    steps = stage.pictures // stage.batch
    stream = batches(config, sets, state.stage, state.step)
    state.model.train()
    parts: list[Tensor] = []
    saved = reported = time.monotonic()
    first_reported = state.step
    while state.step < steps:
        parts.append(_step(state, stage, steps, next(stream), device))
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS:
            rate = (state.step - first_reported) * stage.batch / (now - reported)
            score, misfit = (round(float(value), 4) for value in torch.stack(parts).mean(0))
            line = {"stage": state.stage, "step": state.step, "of": steps, "score": score, "box": misfit}
            left = (steps - state.step) * stage.batch / rate / 60
            write_line(places.run, line | {"pictures_per_second": round(rate, 1), "minutes_left": round(left, 1)})
            parts, reported, first_reported = [], now, state.step
        over = places.over()
        if now - saved > _CHECKPOINT_SECONDS or over or state.step == steps:
            _save(state, places.run / "checkpoint.pth")
            write_line(
                places.run,
                {"stage": state.stage, "step": state.step, **quick_check(state.averaged, dev, config.side, device)},
            )
            saved = reported = time.monotonic()
            first_reported = state.step
            if over and state.step < steps:
                return False
    return True


def _step(state: State, stage: Stage, steps: int, batch: Batch, device: torch.device) -> Tensor:
    """One step of the optimizer; gives the losses [2] (score, box)."""
    for group in state.optimizer.param_groups:
        peak = stage.learning_rate * (stage.backbone if group["backbone"] else 1.0)
        group["lr"] = learning_rate(peak, stage.warm_up, state.step, steps)
    found = losses(state.model, batch, device)
    state.optimizer.zero_grad()
    (found["score"] + found["box"]).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(state.model.parameters(), 10.0)
    state.optimizer.step()
    state.step += 1
    average(state.averaged, state.model, min(stage.average, (1 + state.step) / (10 + state.step)))
    return torch.stack([found["score"].detach(), found["box"].detach()])


def _new_optimizer(model: PersonDetector) -> torch.optim.Optimizer:
    groups = []
    for backbone in (True, False):
        for decayed in (True, False):  # norms, biases and depthwise kernels are not decayed
            parameters = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and name.startswith("backbone.") == backbone and (p.ndim > 1 and p.shape[1] > 1) == decayed
            ]
            groups.append({"params": parameters, "weight_decay": 0.02 if decayed else 0.0, "backbone": backbone})
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


def _save(state: State, file: Path) -> None:
    content = {"stage": state.stage, "step": state.step, "optimizer": state.optimizer.state_dict()}
    content |= {"model": state.model.state_dict(), "averaged": state.averaged.state_dict()}
    with whole_file(file) as out:
        torch.save(content, out)


def _resume(state: State, file: Path, device: torch.device) -> None:
    if not file.exists():
        return
    content = torch.load(file, map_location=device, weights_only=True)
    state.model.load_state_dict(content["model"])
    state.averaged.load_state_dict(content["averaged"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.stage, state.step = content["stage"], content["step"]
    log.info("resumed at stage %d, step %d", state.stage, state.step)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.detector.train", description="Train the person detector.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder that the config's sets are in")
    parser.add_argument("--cache", type=Path, default=Path(".cache/photos"), help="where decoded photos are kept (3 GB)")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    parser.add_argument("--imagenet", type=Path, help="efficientnet-lite0-57934424.pth, where a new run's backbone starts")
    parser.add_argument("--start", type=Path, help="weights.pth of a run, from which a new run starts")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cv2.setNumThreads(1)
    stopped = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: stopped.set())
    until = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    places = Places(arguments.data, arguments.cache, arguments.run, until, stopped)
    try:
        train(Config.read(arguments.config), places, arguments.imagenet, arguments.start)
    except DataError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
