"""Train the person detector: `python -m training.detector.train CONFIG.toml --data DATA --run DIR --imagenet FILE`.

As training.train: stages one after the other, each from the averaged weights of the one before; everything is drawn from
(seed, stage, step), and the run folder holds the last checkpoint, which SIGTERM and Ctrl-C write too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from training.command import one_line_faults
from training.config import FromToml, Shares, Table
from training.detector.augment import Batch, Variation, augmented_batch
from training.detector.data import Photos, cached_photos
from training.detector.loss import detection_loss
from training.detector.network import PersonDetector, cells, normalised
from training.precision import has_bfloat16
from training.schedule import one_ahead
from training.state import State
from training.trainer import STOPPED, Place, Plan, Trainer, place_of, prepare_training, training_parser
from training.weights import check_tensors, read_checked

_CHECKED_PHOTOS = 96


class Stage(Table):
    """One run of the learning-rate schedule."""

    size: int = Field(gt=0, multiple_of=32)  # of the training pictures; photos are cut where they are larger
    pictures: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float
    scale: tuple[PositiveFloat, PositiveFloat]  # of photos, against the config's side
    mosaic: float = Field(ge=0, le=1)
    sets: Shares | None = None  # instead of the config's
    backbone: float = 0.25  # its learning rate, as a share
    warm_up: int = 100  # steps
    average: float = 0.998  # of the weights, a step

    @model_validator(mode="after")
    def _some_step(self) -> Self:
        if self.pictures < self.batch:
            raise ValueError("pictures are fewer than one batch")
        return self


class Config(FromToml):
    """What a run depends on, beside the data."""

    seed: int
    channels: int  # of the pyramid and the heads
    sets: Shares  # by folder and name of a set
    dev: str
    side: int = Field(gt=0, multiple_of=32)  # at which photos are cached, and at 1 of a stage's scale shown
    stages: list[Stage] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run reads and writes, and on what it computes."""

    config: Config
    data: Path
    cache: Path
    place: Place
    device: torch.device


def batches(config: Config, sets: list[Photos], number: int, first: int) -> Iterator[Batch]:
    """Batches of stage `number` from step `first` on."""
    stage, seed = config.stages[number], (config.seed, number)
    shares = list((stage.sets or config.sets).values())
    variation = Variation(scale=stage.scale, mosaic=stage.mosaic)

    def make(step: int, members: list[tuple[int, int]]) -> Batch:
        return augmented_batch(sets, members, stage.size, config.side, variation, np.random.default_rng((*seed, step, 1)))

    return one_ahead(make, sets, shares, stage.batch, seed, first)


def losses(model: PersonDetector, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The losses of a batch, in mixed precision but for the boxes."""
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        logits, boxes = model(normalised(torch.from_numpy(batch.pictures).to(device)))
    people, ignored = ([torch.from_numpy(places).to(device) for places in rows] for rows in (batch.people, batch.ignored))
    centres, strides = (values.to(device) for values in cells(*batch.pictures.shape[1:3]))
    return detection_loss(logits, boxes, people, ignored, centres, strides)


@torch.no_grad()
def quick_check(model: PersonDetector, photos: Photos, side: int, device: torch.device) -> dict[str, float]:
    """The losses on some photos, each brought to `side` and always placed alike: a guide; `evaluate` gives the figures."""
    still = Variation(scale=(1.0, 1.0), mosaic=0.0, rotated=0.0, stretch=0.0, colour=False)
    model.eval()
    found: list[dict[str, float]] = []
    for start in range(0, min(_CHECKED_PHOTOS, len(photos)), 16):
        members = [(0, index) for index in range(start, min(start + 16, len(photos)))]
        batch = augmented_batch([photos], members, side, side, still, np.random.default_rng(0))
        found.append({name: float(value) for name, value in losses(model, batch, device).items()})
    model.train()
    return {f"dev_{name}": float(np.mean([values[name] for values in found])) for name in found[0]}


def train(run: Run, imagenet: Path | None, start: Path | None) -> bool:
    """Train until the last stage ends or the run is to stop; True when all is done. Writes into the run's folder.

    A new run starts from the backbone in the file `imagenet`, or from the whole weights in `start`, or from scratch. Raises
    DataError.
    """
    torch.manual_seed(run.config.seed)
    model = PersonDetector(run.config.channels)
    if imagenet is not None:
        model.backbone.load_imagenet(imagenet)

    def check(weights: Any) -> None:
        check_tensors(weights, model, f"a detector of {run.config.channels} channels")

    if start is not None:
        model.load_state_dict(read_checked(start, check))
    stages = run.config.stages
    trainer: Trainer[PersonDetector, Batch] = Trainer(
        stages=len(stages),
        config=run.config,
        plan=lambda state: _plan(run, state),
        groups=lambda model, stage: _parameter_groups(model, stages[stage]),
        check_weights=check,
        unit="pictures",
    )
    return trainer.train(model, run.device, run.place)


def _plan(run: Run, state: State[PersonDetector]) -> Plan[Batch]:
    config = run.config
    stage = config.stages[state.stage]
    sets = [cached_photos(run.data / f"{name}.json", run.cache, config.side) for name in stage.sets or config.sets]
    dev = cached_photos(run.data / f"{config.dev}.json", run.cache, config.side)
    return Plan(
        steps=stage.pictures // stage.batch,
        batch=stage.batch,
        warm_up=stage.warm_up,
        peak=stage.learning_rate,
        kept=stage.average,
        batches=batches(config, sets, state.stage, state.step),
        losses=lambda batch: losses(state.model, batch, run.device),
        check=lambda: quick_check(state.averaged, dev, config.side, run.device),
    )


def _parameter_groups(model: PersonDetector, stage: Stage) -> list[dict[str, Any]]:
    """Norms, biases and depthwise kernels are not decayed; the backbone learns more slowly."""
    groups = []
    for backbone in (True, False):
        for decayed in (True, False):
            parameters = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and name.startswith("backbone.") == backbone and (p.ndim > 1 and p.shape[1] > 1) == decayed
            ]
            share = stage.backbone if backbone else 1.0
            groups.append({"params": parameters, "weight_decay": 0.02 if decayed else 0.0, "share": share})
    return groups


def main() -> None:
    """The command line."""
    parser = training_parser("python -m training.detector.train", "Train the person detector.", cache=".cache/photos")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    parser.add_argument("--imagenet", type=Path, help="efficientnet-lite0-57934424.pth, where a new run's backbone starts")
    arguments = parser.parse_args()
    device = arguments.device
    prepare_training(device)
    with one_line_faults():
        place = place_of(arguments.run, arguments.minutes, arguments.start)
        run = Run(Config.read(arguments.config), arguments.data, arguments.cache, place, device)
        if not train(run, arguments.imagenet, arguments.start):
            raise SystemExit(STOPPED)


if __name__ == "__main__":
    main()
