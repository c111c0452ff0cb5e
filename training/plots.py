"""Plots as PNG files: what a calibration promises and keeps, and how a training went."""

import io
from collections.abc import Mapping

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


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=100, metadata={"Software": None})
    return out.getvalue()
