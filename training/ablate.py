"""Short runs that differ in one thing: `python -m training.ablate CONFIG.toml --data DIR --out DIR`.

The config names a base, what all runs change of it, and what each run changes more. Every run sees as many crops. They go one
by one and on where they were stopped; tables compare them on the dev sets with the first run, over the same pictures.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from app.vision import box, crop
from training.accuracy import Accuracy, difference, joint_table
from training.command import one_line_faults
from training.config import Config, FromToml, table_in
from training.data import ASPECT, Picture
from training.decoders import OURS
from training.estimators import PLAIN, Estimator, Float64
from training.evaluate import dev_sets, evaluate_set, labelled_boxes
from training.files import DataError, make_folder, write_whole
from training.lpn import HEATMAP_STRIDE, LPN
from training.pixels import normalised
from training.train import Run, train
from training.trainer import STOPPED, place_of, prepare_training, training_parser
from training.weights import read_lpn

log = logging.getLogger("training")

_BATCH = 32


class Ablations(FromToml):
    """The content of a config: `base` is a training config beside it; changes are tables of the same form."""

    base: Path
    changes: dict[str, Any]
    runs: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One run: its name and its whole config."""

    name: str
    config: Config

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def variants(file: Path) -> list[Variant]:
    """The runs of an ablation config, in its order. Raises DataError that names the file and the fault."""
    ablations = Ablations.read(file)
    base = _changed(table_in(file.parent / ablations.base), ablations.changes)
    made = [Variant(name, Config.of(_changed(base, more), file)) for name, more in ablations.runs.items()]
    folders = [variant.folder for variant in made]
    if len(set(folders)) < len(folders):
        raise DataError(f"{file}: names of runs must differ in letters or digits")
    return made


def _changed(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A table with some values replaced, also in the tables in it."""
    inner = {key: _changed(table[key], value) for key, value in changes.items() if isinstance(value, dict) and key in table}
    return table | changes | inner


def torch_estimator(model: LPN, height: int, device: torch.device) -> Estimator:
    """The network in PyTorch on crops `height` high, decoded as exported models are, without flip test."""
    width = height * 3 // 4
    map_size = (width // HEATMAP_STRIDE, height // HEATMAP_STRIDE)

    def estimate(picture: Picture, boxes: Float64) -> dict[str, Float64]:
        centres, sizes = box.centres_and_sizes(boxes, ASPECT)
        crops = np.empty((len(boxes), height, width, 3), np.uint8)
        crop.cut_crops(picture.pixels(), box.crop_affines(centres, sizes, width, height), crops)
        maps = []
        for start in range(0, len(crops), _BATCH):
            pixels = normalised(torch.from_numpy(crops[start : start + _BATCH]).to(device))
            with torch.inference_mode():
                maps.append(model(pixels).float().cpu().numpy())
        found = OURS(np.concatenate(maps))
        places = box.to_picture(found[..., :2], centres, sizes, *map_size)
        return {PLAIN: np.concatenate([places, found[..., 2:]], axis=2)}

    return estimate


def measured(run: Run) -> dict[str, Accuracy]:
    """The accuracy of a finished run on every dev set, measured once and then read from its folder.

    With another decoder or other dev sets it is measured anew.
    """
    sets = dev_sets(run.data)
    measured_by = hashlib.sha256(repr(OURS).encode())
    for content in (run.place.folder / "weights.pth", *sets.values()):
        measured_by.update(content.read_bytes())
    file = run.place.folder / f"accuracy-{measured_by.hexdigest()[:12]}.json"
    if not file.exists():
        model = read_lpn(run.place.folder / "weights.pth", run.config.depth, run.config.attention).to(run.device).eval()
        estimate = torch_estimator(model, run.config.stages[-1].height, run.device)
        found = {name: evaluate_set(annotations, None, labelled_boxes, estimate)[PLAIN] for name, annotations in sets.items()}
        write_whole(file, json.dumps({name: dataclasses.asdict(accuracy) for name, accuracy in found.items()}, default=list))
    content = json.loads(file.read_text())
    return {
        name: Accuracy(**{**fields, "draws": {measure: np.array(values) for measure, values in fields["draws"].items()}})
        for name, fields in content.items()
    }


def tables(rows: dict[str, dict[str, Accuracy]], budget: int) -> str:
    """The runs as Markdown: AP on coco, PCK on every set, each with its difference to the first run's; and PCK by joint."""
    first = next(iter(rows.values()))
    sets = [name for name, accuracy in first.items() if "pck" in accuracy.measures]
    text = [f"{budget:,} crops each.", ""]
    heads = ["AP, coco", "− first", *(head for name in sets for head in (f"PCK@0.2, {name}", "− first"))]
    text += [f"| run | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for name, found in rows.items():
        cells = []
        for set_, measure in [("coco", "ap"), *((set_, "pck") for set_ in sets)]:
            cells += [f"{found[set_].measures[measure]:.3f}", difference(found[set_], first[set_], measure)]
        text.append(f"| {name} | {' | '.join(cells)} |")
    for set_ in sets:
        by_joint = joint_table({name: found[set_].by_joint for name, found in rows.items()})
        text += ["", f"PCK@0.2 by joint, {set_}:", "", by_joint]
    return "\n".join(text) + "\n"


def _claim(file: Path, config: Config, start: str | None) -> None:
    """Write what makes a run what it is into its folder: its config, and the hashes of its start and of its teacher.

    Raises DataError where something else is there: its results are another run's.
    """
    hashes = {"start": start} | ({"teacher": _hash(config.distillation.model / "model.toml")} if config.distillation else {})
    if file.exists() and not _is_of(json.loads(file.read_text()), hashes, config):
        raise DataError(f"{file} is of another config or start; give another --out or remove {file.parent}")
    write_whole(file, json.dumps(hashes | {"config": config.model_dump(mode="json")}, indent=1))


def _is_of(written: dict[str, Any], hashes: dict[str, str | None], config: Config) -> bool:
    """Whether it was written for the same; keys that configs have got since then have their defaults in it."""
    try:
        return {name: written[name] for name in written if name != "config"} == hashes and config == Config.model_validate(
            written["config"]
        )
    except ValidationError:
        return False


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def ablate(arguments: argparse.Namespace) -> None:
    """Train and measure every run, and write the table anew after each. Raises DataError and ModelError."""
    device = arguments.device
    whole = place_of(arguments.out, arguments.minutes)
    start = _hash(arguments.start) if arguments.start else None
    rows: dict[str, dict[str, Accuracy]] = {}
    for variant in variants(arguments.config):
        place = dataclasses.replace(whole, folder=arguments.out / variant.folder)
        on_device = device.type == "cuda"
        make_folder(place.folder)
        _claim(place.folder / "config.json", variant.config, start)
        run = Run(variant.config, arguments.data, arguments.cache, place, device, on_device, compiled=False)
        if not (place.folder / "weights.pth").exists() and not train(run, arguments.start):
            raise SystemExit(f"{variant.name} {STOPPED}")
        rows[variant.name] = measured(run)
        text = tables(rows, sum(stage.crops for stage in variant.config.stages))
        write_whole(arguments.out / "table.md", text)
        log.info("%s\n%s", variant.name, text)


def main() -> None:
    """The command line."""
    parser = training_parser("python -m training.ablate", "Compare short trainings.", cache=".cache/crops")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and table.md")
    arguments = parser.parse_args()
    prepare_training(arguments.device)
    with one_line_faults():
        ablate(arguments)


if __name__ == "__main__":
    main()
