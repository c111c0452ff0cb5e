"""Train LPN: `python -m training.train CONFIG.toml --data DIR --run DIR`.

Stages run one after the other, each from the averaged weights of the one before with the learning rate started anew. A run
goes on where it stopped: everything is drawn from (seed, stage, step), and the run folder holds the last checkpoint.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.augment import Augmentation, Changes, augmented_batch, changed_crops, drawn_changes
from training.command import coco_model, one_line_faults
from training.config import Config, Stage
from training.data import People, cached_people, read_annotations
from training.decoders import OURS
from training.device import changed_crops as crops_on_device
from training.device import resident
from training.files import DataError, write_whole
from training.loss import heatmap_loss, target_heatmaps, trust_in
from training.lpn import HEATMAP_STRIDE, LPN
from training.oks import joint_similarities
from training.pixels import normalised
from training.plots import training_plot
from training.precision import has_bfloat16
from training.schedule import Members, one_ahead
from training.state import State
from training.synthetic.studio import Studio
from training.trainer import STOPPED, Place, Plan, Trainer, place_of, prepare_training, training_parser
from training.weights import check_weights, read_lpn

# One step's people: crops [N, H, W, 3], keypoints [N, 17, 2] in crop pixels, weights [N, 17], and a teacher's heatmaps
# [N, 17, H/4, W/4], empty without one; on the device.
Step = tuple[Tensor, Tensor, Tensor, Tensor]
# What is drawn of a step: the people to choose from, the chosen, what becomes of them, and, if OpenCV made them, their crops
# and what the teacher says of them.
Part = tuple[list[People], Members, Changes, Any, Any]
Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Teacher = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run reads and writes, and on what it computes."""

    config: Config
    data: Path
    cache: Path
    place: Place
    device: torch.device
    on_device: bool  # the crops lie on the device and are made there, else by OpenCV
    compiled: bool


def teacher_of(run: Run, stage: Stage) -> Teacher:
    """From crops [N, H, W, 3] to the teacher's heatmaps with flip test, [N, 17, H/4, W/4]; [N, 0, 0, 0] without a teacher.

    Raises ModelError, and DataError where it is of crops or heatmaps that are not the stage's.
    """
    if run.config.distillation is None:
        return lambda crops: np.zeros((len(crops), 0, 0, 0), np.float32)
    model = coco_model(run.config.distillation.model)
    told, height, width = model.description, stage.height, stage.height * 3 // 4
    wanted = height, width, height // HEATMAP_STRIDE, width // HEATMAP_STRIDE
    if (told.input.height, told.input.width, told.heatmap.height, told.heatmap.width) != wanted:
        crops = f"crops {told.input.height} high and {told.input.width} wide"
        raise DataError(f"{told.id} takes {crops}, and a stage has {height} and {width}: it cannot teach it")
    return lambda crops: model.averaged(model.heatmaps(crops), model.heatmaps(crops[:, :, ::-1]))


def steps_of(run: Run, sets: list[People], stage: Stage, number: int, first: int) -> Iterator[Step]:
    """The steps of a stage from `first` on, each made, or at least drawn, one ahead in a thread of its own."""
    seed = (run.config.seed, number)
    names = stage.sets or run.config.sets
    people = resident(sets, run.device) if run.on_device else None
    taught_by = teacher_of(run, stage)
    rendered = run.config.rendered
    studio = Studio.open(rendered.assets, rendered.hdm05, rendered.backgrounds, run.device) if rendered else None
    kept = stage.batch - (max(1, round(rendered.share * stage.batch)) if rendered else 0)

    def steps(shares: dict[str, float], augmentation: Augmentation, begin: int) -> Iterator[list[Part]]:
        def part(chosen: list[People], members: Members, rng: np.random.Generator) -> Part:
            changes = drawn_changes(chosen, members, stage.height, augmentation, rng)
            crops = changed_crops(chosen, members, changes) if people is None else None
            return chosen, members, changes, crops, None if crops is None else taught_by(crops)

        def draw(step: int, members: Members) -> list[Part]:
            rng = np.random.default_rng((*seed, step, 1))
            parts = [part(sets, members[:kept], rng)] if kept else []
            if studio is not None:
                made = studio.people(stage.batch - kept, stage.height, (*seed, step, 2))
                parts.append(part([made], [(0, index) for index in range(len(made))], rng))
            return parts

        return one_ahead(draw, sets, [shares.get(name, 0) for name in names], stage.batch, seed, begin)

    changed = run.config.augmentation
    every = steps(names, changed, first)
    if (ending := stage.ending) is not None:
        begin = max(first, round((1 - ending.share) * (stage.crops // stage.batch)))
        every = chain(islice(every, begin - first), steps(ending.sets, ending.augmentation or changed, begin))
    for parts in every:
        crops, taught = [], []
        for chosen, members, changes, made, maps in parts:
            if people is None:
                crops.append(torch.from_numpy(made).to(run.device))
                taught.append(maps)
            else:
                there = people if chosen is sets else resident(chosen, run.device)
                crops.append(crops_on_device(there, members, changes))
                taught.append(taught_by(crops[-1].round().byte().cpu().numpy()))
        keypoints, weights, maps = (
            torch.from_numpy(np.concatenate(each)).to(run.device)
            for each in (
                [changes.keypoints for _, _, changes, _, _ in parts],
                [changes.weights for _, _, changes, _, _ in parts],
                taught,
            )
        )
        yield torch.cat(crops), keypoints, weights, maps


def losses_of(run: Run, model: LPN, stage: Stage) -> Losses:
    """From crops, keypoints and weights of a batch to its loss, by the labels and by a teacher if there is one."""
    share = run.config.distillation.share if run.config.distillation else 0.0
    map_height, map_width = stage.height // HEATMAP_STRIDE, stage.height * 3 // 4 // HEATMAP_STRIDE
    mixed = has_bfloat16(run.device)  # asked here, since asking would break a compiled loss in two

    def loss_of(crops: Tensor, keypoints: Tensor, weights: Tensor, taught: Tensor) -> Tensor:
        pixels = normalised(crops)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=mixed):
            heatmaps = model(pixels)
        targets = target_heatmaps(keypoints / HEATMAP_STRIDE, map_height, map_width, stage.sigma)
        loss = heatmap_loss(heatmaps.float(), targets, weights, stage.placement, stage.hardest)
        if share:
            of_teacher = heatmap_loss(heatmaps.float(), taught, trust_in(taught), stage.placement)
            loss = (1 - share) * loss + share * of_teacher
        return loss

    if not run.compiled:
        return loss_of
    torch.compiler.reset()  # or the second stage's sizes would make a graph of free sizes, which is slower
    return torch.compile(loss_of, dynamic=False)


def quick_check(model: LPN, people: People, height: int, device: torch.device) -> dict[str, float]:
    """Mean OKS and share of people over OKS 0.5 among the first 640 people of a set, cropped at their boxes.

    A guide while training; `training.evaluate` gives the figures that count. People's areas are taken from their crops, which
    makes them 1.65 times too large in the median, and OKS too high (0.79 where it is 0.73).
    """
    count = min(640, len(people))
    model.eval()
    oks = []
    for start in range(0, count, 64):
        members = [(0, index) for index in range(start, min(start + 64, count))]
        batch = augmented_batch([people], members, height, Augmentation.none(), np.random.default_rng(0))
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            maps = model(normalised(torch.from_numpy(batch.crops).to(device))).float().cpu().numpy()
        found = OURS(maps)[..., :2] * HEATMAP_STRIDE
        area = (height / 1.25) * (height * 0.75 / 1.25) * 0.55  # COCO's area of a person is about half the box's
        alike = joint_similarities(((found - batch.keypoints) ** 2).sum(2), np.full(len(found), area))
        labelled = batch.weights > 0
        with np.errstate(invalid="ignore"):
            oks.append((alike * labelled).sum(1) / labelled.sum(1))
    model.train()
    values = np.concatenate(oks)
    return {"oks": float(np.nanmean(values)), "oks50": float((values > 0.5).mean())}


def train(run: Run, start: Path | None) -> bool:
    """Train until the last stage ends or the run is to stop; True when all is done. Writes into the run's folder.

    A new run starts from the weights in the file `start`, or from scratch. Raises DataError, and ModelError for a teacher.
    """
    for stage in run.config.stages:  # now, not hours later when its turn comes
        teacher_of(run, stage)
    for name in dict.fromkeys(name for stage in run.config.stages for name in stage.sets or run.config.sets):
        read_annotations(run.data / "train" / f"{name}.json")
    read_annotations(run.data / "dev" / "coco.json")
    torch.manual_seed(run.config.seed)
    depth, attention = run.config.depth, run.config.attention

    def check(weights: Any) -> None:
        found = check_weights(weights, attention)
        if found != depth:
            raise ValueError(f"it is of an LPN-{found}, and the config asks for an LPN-{depth}")

    trainer: Trainer[LPN, Step] = Trainer(
        stages=len(run.config.stages),
        config=run.config,
        plan=lambda state: _plan(run, state),
        groups=lambda model, _: _parameter_groups(model),
        check_weights=check,
        unit="crops",
    )
    model = LPN(depth, attention=attention) if start is None else read_lpn(start, depth, attention)
    if not trainer.train(model, run.device, run.place):
        return False
    write_whole(run.place.folder / "curves.png", training_plot(run.place.folder / "log.jsonl"))
    return True


def _plan(run: Run, state: State[LPN]) -> Plan[Step]:
    stage = run.config.stages[state.stage]
    sets = [
        cached_people(run.data / "train" / f"{name}.json", run.cache, stage.height) for name in stage.sets or run.config.sets
    ]
    dev = cached_people(run.data / "dev" / "coco.json", run.cache, stage.height)
    loss_of = losses_of(run, state.model, stage)
    return Plan(
        steps=stage.crops // stage.batch,
        batch=stage.batch,
        warm_up=stage.warm_up,
        peak=stage.learning_rate,
        kept=stage.average,
        batches=steps_of(run, sets, stage, state.stage, state.step),
        losses=lambda step: {"loss": loss_of(*step)},
        check=lambda: quick_check(state.averaged, dev, stage.height, run.device),
    )


def _parameter_groups(model: LPN) -> list[dict[str, Any]]:
    """Norms and biases are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim == 4]
    plain = [p for p in model.parameters() if p.ndim != 4]
    return [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]


def main() -> None:
    """The command line."""
    parser = training_parser("python -m training.train", "Train LPN from a config.", cache=".cache/crops")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    parser.add_argument(
        "--resident", action="store_true", help="all crops lie on the device and are augmented there; a GPU does so anyway"
    )
    parser.add_argument("--compile", action="store_true", help="compile the loss with torch.compile")
    arguments = parser.parse_args()
    device = arguments.device
    prepare_training(device)
    with one_line_faults():
        run = Run(
            config=Config.read(arguments.config),
            data=arguments.data,
            cache=arguments.cache,
            place=place_of(arguments.run, arguments.minutes, arguments.start),
            device=device,
            on_device=arguments.resident or device.type == "cuda",
            compiled=arguments.compile,
        )
        if not train(run, arguments.start):
            raise SystemExit(STOPPED)


if __name__ == "__main__":
    main()
