"""How far off each joint is to be expected: `python -m training.calibrate --model lpn50/1 --data DATA --write`.

The expected error follows the score and the spread of a joint's heatmap (app/vision/heatmap.py). It is fitted on one half of
the pictures of dev/coco and checked on the other half, and on the other dev sets, that the fit never saw.
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.inference.model_store import CalibrationTable
from app.inference.pose import PoseModel
from app.inference.session import take_one_thread_each
from app.vision import heatmap
from training.command import coco_model, measuring_parser, model_folder, one_line_faults
from training.data import read_pictures
from training.estimators import cut, decoder_of
from training.evaluate import dev_sets, labelled_people
from training.files import DataError, write_whole
from training.plots import reliability_plot

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_BATCH = 8
_BINS = 10


@dataclass(frozen=True, slots=True)
class Joints:
    """Labelled joints of people: which of the 17 [M], their signs [M, 2] errors [M] in cells, and which are fitted."""

    joints: npt.NDArray[np.int64]
    signs: Float32
    errors: Float64
    fitted: npt.NDArray[np.bool_]

    def part(self, fitted: bool) -> "Joints":
        """Those of one half of the pictures."""
        chosen = self.fitted == fitted
        return Joints(self.joints[chosen], self.signs[chosen], self.errors[chosen], self.fitted[chosen])


def labelled_joints(model: PoseModel, annotation_file: Path) -> Joints:
    """The labelled joints of a set from their people's boxes, without flip test. Raises DataError."""
    shape = model.description.heatmap
    joints, signs, errors, fitted = [], [], [], []
    for picture in read_pictures(annotation_file):
        people, boxes = labelled_people(picture)
        if not people:
            continue
        crops = cut(model, picture, boxes)
        maps = np.concatenate([model.heatmaps(crops.pixels[i : i + _BATCH]) for i in range(0, len(boxes), _BATCH)])
        cells = decoder_of(model)(maps)
        labels = np.array([person["keypoints"] for person in people], np.float64).reshape(len(people), -1, 3)
        distances = np.linalg.norm(model.to_picture(cells, crops)[..., :2] - labels[..., :2], axis=2)
        labelled = labels[..., 2] > 0
        joints.append(np.nonzero(labelled)[1])
        signs.append(heatmap.error_signs(maps, cells[..., 2])[labelled])
        errors.append((distances * shape.height / crops.sizes[:, 1:])[labelled])
        fitted.append(np.full(labelled.sum(), hashlib.sha256(picture.data).digest()[0] % 2 == 0))
    if not joints:
        raise DataError(f"{annotation_file} holds nobody with keypoints")
    return Joints(*(np.concatenate(parts) for parts in (joints, signs, errors, fitted)))


def fit(measured: Joints, count: int) -> CalibrationTable:
    """The calibration of `count` joints under which the errors are likeliest, as quasi-Poisson regression has it.

    Its mean is right for each joint, and not only for the logarithm of the errors, whose few large ones matter.
    """
    columns = np.hstack([np.eye(count)[measured.joints], measured.signs])
    start = np.log(measured.errors.mean())
    values = np.concatenate([np.full(count, start), np.zeros(measured.signs.shape[1])])
    for _ in range(100):
        expected = np.exp(columns @ values)
        # A joint that is hardly ever labelled stays near the mean: one error's worth of weight holds it there.
        held = np.concatenate([values[:count] - values[:count].mean(), np.zeros(measured.signs.shape[1])])
        slope = columns.T @ (measured.errors - expected) - held
        curve = (columns * expected[:, None]).T @ columns + np.eye(len(values))
        change = np.linalg.solve(curve, slope)
        values += np.clip(change, -1, 1)
        if np.abs(change).max() < 1e-9:
            break
    rounded = [round(float(value), 4) for value in values]
    return CalibrationTable(intercepts=tuple(rounded[:count]), score=rounded[count], spread=rounded[count + 1])


def expected(table: CalibrationTable, measured: Joints) -> Float64:
    """The errors [M], in cells, that the calibration expects of joints."""
    intercepts = np.array(table.intercepts, np.float32)[measured.joints]
    weights = np.array([table.score, table.spread], np.float32)
    return heatmap.expected_errors(measured.signs, intercepts, weights).astype(np.float64)


def reliability(wanted: Float64, found: Float64) -> Float64:
    """Joints in ten equal parts by expected error: the mean expected and the mean found error of each, [10, 2]."""
    parts = np.array_split(np.argsort(wanted, kind="stable"), _BINS)
    return np.array([[wanted[part].mean(), found[part].mean()] for part in parts if len(part)])


def tables(rows: dict[str, tuple[Float64, Float64]], height: int) -> str:
    """Expected and found errors of sets, in percent of the height of the padded box, as Markdown."""
    lines = ["| people | joints | expected | found | correlation |", "| --- " * 5 + "|"]
    for name, (wanted, found) in rows.items():
        means = f"{100 * wanted.mean() / height:.2f} % | {100 * found.mean() / height:.2f} %"
        lines.append(f"| {name} | {len(found)} | {means} | {np.corrcoef(wanted, found)[0, 1]:.2f} |")
    first, (wanted, found) = next(iter(rows.items()))
    lines += ["", f"| {first}, tenths by expected error | expected | found |", "| --- | --- | --- |"]
    for number, (of_wanted, of_found) in enumerate(reliability(wanted, found), 1):
        lines.append(f"| {number} | {100 * of_wanted / height:.2f} % | {100 * of_found / height:.2f} % |")
    return "\n".join(lines)


def record(model_file: Path, table: CalibrationTable) -> None:
    """Write the calibration into a model.toml, before its accuracy tables; one that is there is replaced."""
    text = model_file.read_text()
    head, mark, accuracy = text.partition("[accuracy")
    head = head.split("\n# Expected distance", 1)[0].rstrip()
    section = f"""
# Expected distance from the true place in cells: exp(intercept of the joint + score · ln(score) + spread · ln(spread)),
# where a score counts as 0.01 at least, and a spread as 0.5 cells.
[calibration]
intercepts = {list(table.intercepts)}
score = {table.score}
spread = {table.spread}
"""
    write_whole(model_file, f"{head}\n{section}" + (f"\n{mark}{accuracy}" if mark else ""))


def _calibrate(arguments: argparse.Namespace) -> None:
    folder = model_folder(arguments.store, arguments.model)
    model = coco_model(folder)
    names, height = model.description.keypoints.names, model.description.heatmap.height
    files = dev_sets(arguments.data)
    coco = labelled_joints(model, files.pop("coco"))
    if coco.fitted.all() or not coco.fitted.any():
        raise DataError(f"{arguments.data}/dev/coco.json has too few pictures: all of them fall into one half")
    table = fit(coco.part(True), len(names))
    others = {name: labelled_joints(model, file) for name, file in files.items()}
    checked = {"coco, the other half": coco.part(False)} | others | {"coco, the fitted half": coco.part(True)}
    rows = {name: (expected(table, measured), measured.errors) for name, measured in checked.items()}
    print(tables(rows, height))
    if arguments.write:
        plot = reliability_plot({name: reliability(*pair) / height for name, pair in rows.items()})
        record(folder / "model.toml", table)
        write_whole(folder / "reliability.png", plot)
        PoseModel.load(folder)


def main() -> None:
    """The command line."""
    parser = measuring_parser("python -m training.calibrate", "Calibrate a model's expected errors.", "lpn50")
    parser.add_argument("--data", type=Path, required=True, help="folder with dev/ sets")
    parser.add_argument(
        "--write", action="store_true", help="write [calibration] into model.toml, and reliability.png beside it"
    )
    arguments = parser.parse_args()
    take_one_thread_each()
    with one_line_faults():
        _calibrate(arguments)


if __name__ == "__main__":
    main()
