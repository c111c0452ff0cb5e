"""Plots as PNG files: what a calibration promises and keeps, how a training went, how people are found."""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

Float64 = npt.NDArray[np.float64]


def reliability_plot(curves: Mapping[str, Float64]) -> bytes:
    """Named curves [10, 2] of expected and found error, as shares of the padded box's height."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    end = 100 * max(curve.max() for curve in curves.values()) * 1.05
    axes.plot([0, end], [0, end], color="0.7", linewidth=1)
    for name, curve in curves.items():
        axes.plot(*(100 * curve.T), marker="o", markersize=4, label=name)
    axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    axes.set(xlabel="expected error, % of the padded box's height", ylabel="mean error found, %")
    axes.legend(frameon=False)
    return _png(figure)


def training_plot(log_file: Path) -> bytes:
    """A run's log.jsonl: the loss, the accuracy on dev and the crops a second, stage after stage."""
    lines = []
    for text in log_file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a killed process leaves half a line
            lines.append(json.loads(text))
    ends: dict[int, int] = {}
    for line in lines:
        ends[line["stage"]] = max(ends.get(line["stage"], 0), line["step"])
    starts = {stage: sum(steps for other, steps in ends.items() if other < stage) for stage in ends}
    figure = Figure(figsize=(8, 8), layout="constrained")
    rows = figure.subplots(3, sharex=True)
    for axes, keys in zip(rows, (["loss"], ["oks", "oks50"], ["crops_per_second"]), strict=True):
        for key in keys:
            points = [(starts[line["stage"]] + line["step"], line[key]) for line in lines if key in line]
            axes.plot([x for x, _ in points], [y for _, y in points], marker="." if len(points) < 100 else "", label=key)
        for start in starts.values():
            axes.axvline(start, color="0.8", linewidth=1)
        axes.legend(frameon=False)
    rows[-1].set(xlabel="step; lines where a stage begins")
    return _png(figure)


def precision_recall_plot(curves: Mapping[str, Float64]) -> bytes:
    """Named curves [101] of the precision at recalls of 0, 0.01, … 1."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, precision in curves.items():
        axes.plot(np.linspace(0, 1, len(precision)), np.maximum(precision, 0), label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(color="0.9")
    axes.legend(frameon=False, loc="lower left")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=100, metadata={"Software": None})
    return out.getvalue()
