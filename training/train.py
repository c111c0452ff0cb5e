"""Train LPN: `python -m training.train CONFIG.toml --data DIR --run DIR`.

Stages run one after the other, each from the averaged weights of the one before with the learning rate started anew. A run
goes on where it stopped: everything is drawn from (seed, stage, step), and the run folder holds the last checkpoint.
"""

import argparse
import json
import logging
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from app.vision import heatmap
from training.augment import Augmentation, Batch, augmented_batch
from training.data import People, cached_people
from training.keypoints import SIGMAS
from training.lpn import HEATMAP_STRIDE, LPN

log = logging.getLogger("training")

T = TypeVar("T")

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, in RGB order on BGR pixels, as the reference feeds them
STD = (0.229, 0.224, 0.225)
_CHECKPOINT_SECONDS = 240
_REPORT_SECONDS = 30
_SHARPNESS = 12.0  # of the softmax in the placement loss; heatmaps peak at 1


class Stage(BaseModel):
    """One run of the learning-rate schedule."""

    model_config = ConfigDict(extra="forbid")

    height: int
    crops: int
    batch: int
    learning_rate: float
    sigma: float  # of the target Gaussians, in heatmap cells
    weight_decay: float = 0.02
    warm_up: int = 200  # steps
    average: float = 0.998  # of the weights, a step
    placement: float = 1.0  # weight of the placement loss beside the squared error


class Config(BaseModel):
    """What a run depends on, beside the data."""

    model_config = ConfigDict(extra="forbid")

    seed: int
    depth: int
    sets: dict[str, float]
    stages: list[Stage]

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.model_validate(tomllib.loads(file.read_text()))


@dataclass(slots=True)
class State:
    """A run at one step; `averaged` is the moving average of the weights, which is what is kept in the end."""

    model: LPN
    averaged: LPN
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0
    log_lines: list[dict[str, Any]] = field(default_factory=list)


def normalised(crops: Tensor) -> Tensor:
    """Crops [N, H, W, 3] uint8 BGR → network input [N, 3, H, W] float32, channels last."""
    mean, std = (torch.tensor(values, device=crops.device) * 255 for values in (MEAN, STD))
    return ((crops.float() - mean) / std).permute(0, 3, 1, 2)


def target_heatmaps(keypoints: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Keypoints [N, K, 2] in cells → Gaussians [N, K, H, W] of height 1 at their exact places."""
    rows, columns = (torch.arange(length, device=keypoints.device) for length in (height, width))
    x, y = keypoints[..., :1], keypoints[..., 1:]
    across = torch.exp(-((columns - x) ** 2) / (2 * sigma**2))
    down = torch.exp(-((rows - y) ** 2) / (2 * sigma**2))
    return down.unsqueeze(3) * across.unsqueeze(2)


def heatmap_loss(heatmaps: Tensor, targets: Tensor, weights: Tensor, placement: float) -> Tensor:
    """Squared error plus cross-entropy between softmaxes over the map, averaged by the joints' weights [N, K].

    Both are least at the target. The squared error alone spends its first epochs on learning that most cells are 0; the
    cross-entropy asks at once where the joint is.
    """
    squared = ((heatmaps - targets) ** 2).sum((2, 3))
    wanted = (_SHARPNESS * targets).flatten(2).softmax(2)
    given = (_SHARPNESS * heatmaps).flatten(2).log_softmax(2)
    joint_losses = 0.5 * squared - placement * (wanted * given).sum(2)
    return (joint_losses * weights).sum() / weights.sum().clamp(min=1)


def learning_rate(peak: float, warm_up: int, step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * progress))))


def epoch_order(sets: Sequence[Sized], shares: list[float], seed: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (set, index) of one epoch in random order; a share of 1.5 takes everything once and a random half twice."""
    rng = np.random.default_rng(seed)
    members = []
    for which, (items, share) in enumerate(zip(sets, shares, strict=True)):
        times = np.full(len(items), int(share)) + (rng.random(len(items)) < share % 1)
        members += [(which, int(index)) for index in np.repeat(np.arange(len(items)), times)]
    return [members[i] for i in rng.permutation(len(members))]


def crop_stream(sets: list[People], shares: list[float], stage: Stage, seed: tuple[int, int], first: int) -> Iterator[Batch]:
    """Batches of a stage from step `first` on, made one ahead in a thread of their own."""

    def make(step: int, members: list[tuple[int, int]]) -> Batch:
        return augmented_batch(sets, members, stage.height, Augmentation(), np.random.default_rng((*seed, step, 1)))

    return one_ahead(make, sets, shares, stage.batch, seed, first)


def one_ahead(
    make: Callable[[int, list[tuple[int, int]]], T],
    sets: Sequence[Sized],
    shares: list[float],
    batch: int,
    seed: tuple[int, int],
    first: int,
) -> Iterator[T]:
    """What `make` makes of each step and its members, epoch after epoch from step `first` on; one ahead in a thread."""

    def all_members() -> Iterator[tuple[int, int]]:
        epoch = 0
        while True:
            yield from epoch_order(sets, shares, (*seed, epoch))
            epoch += 1

    members = all_members()
    for _ in range(first * batch):
        next(members)
    with ThreadPoolExecutor(1) as pool:
        step = first
        ahead = pool.submit(make, step, [next(members) for _ in range(batch)])
        while True:
            step += 1
            coming = pool.submit(make, step, [next(members) for _ in range(batch)])
            yield ahead.result()
            ahead = coming


def quick_check(model: LPN, people: People, height: int, device: torch.device) -> dict[str, float]:
    """Mean OKS and share of people over OKS 0.5 among the first 640 people of a set, cropped at their boxes.

    A guide while training; `training.evaluate` gives the figures that count.
    """
    still = Augmentation(**dict.fromkeys(Augmentation.__dataclass_fields__, 0.0))
    count = min(640, len(people))
    model.eval()
    oks = []
    for start in range(0, count, 64):
        members = [(0, index) for index in range(start, min(start + 64, count))]
        batch = augmented_batch([people], members, height, still, np.random.default_rng(0))
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            maps = model(normalised(torch.from_numpy(batch.crops).to(device))).float().cpu().numpy()
        found = heatmap.decode(maps, 160.0, False)[..., :2] * HEATMAP_STRIDE
        area = (height / 1.25) * (height * 0.75 / 1.25) * 0.55  # COCO's area of a person is about half the box's
        distance = ((found - batch.keypoints) ** 2).sum(2) / (2 * area * (2 * SIGMAS) ** 2)
        labelled = batch.weights > 0
        with np.errstate(invalid="ignore"):
            oks.append((np.exp(-distance) * labelled).sum(1) / labelled.sum(1))
    model.train()
    values = np.concatenate(oks)
    return {"oks": float(np.nanmean(values)), "oks50": float((values > 0.5).mean())}


def train(config: Config, data: Path, cache: Path, run: Path, minutes: float | None, start: Path | None) -> bool:
    """Train until the last stage ends or `minutes` have passed; True when all is done. Writes into the folder `run`.

    A new run starts from the weights in the file `start`, or from scratch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    run.mkdir(parents=True, exist_ok=True)
    state = _new_state(config, device)
    if start is not None:
        weights = torch.load(start, map_location=device, weights_only=True)
        state.model.load_state_dict(weights)
        state.averaged.load_state_dict(weights)
    _resume(state, run / "checkpoint.pth", device)
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    while state.stage < len(config.stages):
        if not _train_stage(config, state, data, cache, run, until, device):
            return False
        state.stage, state.step = state.stage + 1, 0
        state.model.load_state_dict(state.averaged.state_dict())
        state.optimizer = _new_optimizer(state.model)
        _save(state, run / "checkpoint.pth")
    torch.save(state.averaged.state_dict(), run / "weights.pth")
    log.info("done: %s", run / "weights.pth")
    return True


def _train_stage(
    config: Config, state: State, data: Path, cache: Path, run: Path, until: float, device: torch.device
) -> bool:
    stage = config.stages[state.stage]
    sets = [cached_people(data / "train" / f"{name}.json", cache, stage.height) for name in config.sets]
    dev = cached_people(data / "dev" / "coco.json", cache, stage.height)
    steps = stage.crops // stage.batch
    map_height, map_width = stage.height // HEATMAP_STRIDE, stage.height * 3 // 4 // HEATMAP_STRIDE
    stream = crop_stream(sets, list(config.sets.values()), stage, (config.seed, state.stage), state.step)
    state.model.train()
    losses: list[Tensor] = []
    saved = reported = time.monotonic()
    first_reported = state.step
    while state.step < steps:
        batch = next(stream)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(stage.learning_rate, stage.warm_up, state.step, steps)
        keypoints = torch.from_numpy(batch.keypoints).to(device) / HEATMAP_STRIDE
        targets = target_heatmaps(keypoints, map_height, map_width, stage.sigma)
        with torch.autocast(device.type, torch.bfloat16):
            heatmaps = state.model(normalised(torch.from_numpy(batch.crops).to(device)))
        loss = heatmap_loss(heatmaps.float(), targets, torch.from_numpy(batch.weights).to(device), stage.placement)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(state.model.parameters(), 10.0)
        state.optimizer.step()
        state.step += 1
        average(state.averaged, state.model, min(stage.average, (1 + state.step) / (10 + state.step)))
        losses.append(loss.detach())
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS:
            rate = (state.step - first_reported) * stage.batch / (now - reported)
            left = (steps - state.step) * stage.batch / rate / 60
            line = {"stage": state.stage, "step": state.step, "of": steps, "loss": float(torch.stack(losses).mean())}
            line |= {"crops_per_second": round(rate, 1), "minutes_left": round(left, 1)}
            write_line(run, line)
            losses, reported, first_reported = [], now, state.step
        if now - saved > _CHECKPOINT_SECONDS or now > until or state.step == steps:
            line = {"stage": state.stage, "step": state.step, **quick_check(state.averaged, dev, stage.height, device)}
            write_line(run, line)
            _save(state, run / "checkpoint.pth")
            saved = reported = time.monotonic()
            first_reported = state.step
            if now > until and state.step < steps:
                return False
    return True


def _new_state(config: Config, device: torch.device) -> State:
    model = LPN(config.depth).to(device, memory_format=torch.channels_last)  # type: ignore[arg-type, call-overload]
    averaged = LPN(config.depth).to(device)  # type: ignore[arg-type]
    averaged.load_state_dict(model.state_dict())
    return State(model, averaged.requires_grad_(False), _new_optimizer(model))


def _new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]  # norms and biases
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, share: float) -> None:
    """Move the averaged weights towards the model's, keeping `share` of themselves."""
    kept = averaged.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            kept[name].lerp_(value, 1 - share)
        else:
            kept[name].copy_(value)


def _save(state: State, file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    content = {"stage": state.stage, "step": state.step, "optimizer": state.optimizer.state_dict()}
    content |= {"model": state.model.state_dict(), "averaged": state.averaged.state_dict()}
    torch.save(content, temporary)
    temporary.replace(file)


def _resume(state: State, file: Path, device: torch.device) -> None:
    if not file.exists():
        return
    content = torch.load(file, map_location=device, weights_only=True)
    state.model.load_state_dict(content["model"])
    state.averaged.load_state_dict(content["averaged"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.stage, state.step = content["stage"], content["step"]
    log.info("resumed at stage %d, step %d", state.stage, state.step)


def write_line(run: Path, line: dict[str, Any]) -> None:
    """Add a line to the run's log.jsonl."""
    log.info(json.dumps(line))
    with (run / "log.jsonl").open("a") as out:
        out.write(json.dumps(line) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train LPN from a config.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and dev/ sets")
    parser.add_argument("--cache", type=Path, default=Path(".cache/crops"), help="where crops are kept")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    parser.add_argument("--start", type=Path, help="weights.pth of a run or of the store to start from, instead of scratch")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cv2.setNumThreads(1)
    config = Config.read(arguments.config)
    train(config, arguments.data, arguments.cache, arguments.run, arguments.minutes, arguments.start)


if __name__ == "__main__":
    main()
