"""A dashboard's picture from its own queries, without Grafana: from the repository's root

    .venv/bin/python docker/grafana/draw.py docker/grafana/dashboards/service.json docker/grafana/service.png

Asks a running Prometheus every panel's query over the last minutes and draws the answers where the panels are. It shows what
the queries tell, not how Grafana would paint it. Needs matplotlib (requirements/training.txt).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

STEP = 10  # seconds
COLOURS = {"text": "#3d4450", "green": "#2e8b57", "yellow": "#c98a00", "red": "#c0392b"}
Panel = dict[str, Any]
Series = list[tuple[dict[str, str], list[float], list[float]]]  # labels, minutes from now (below 0), values


def ask(prometheus: httpx.Client, expression: str, minutes: float) -> Series:
    """What Grafana would ask with all instances and models and the stage total chosen."""
    for variable, value in (("$__rate_interval", "20s"), ("$instance", ".*"), ("$model", ".*"), ("$stage", "total")):
        expression = expression.replace(variable, value)
    now = time.time()
    span = {"query": expression, "start": now - 60 * minutes, "end": now, "step": STEP}
    answer = prometheus.get("/api/v1/query_range", params=span).raise_for_status().json()["data"]["result"]
    return [
        (each["metric"], [(at - now) / 60 for at, _ in each["values"]], [float(v) for _, v in each["values"]])
        for each in answer
    ]


def told(value: float, unit: str) -> str:
    """A value as a person reads it."""
    if unit == "percentunit":
        return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"
    if unit == "s":
        return f"{value * 1000:.0f} ms" if 0 < value < 1 else f"{value:g} s" if value == round(value) else f"{value:.2g} s"
    if unit == "bytes":
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return text + "/s" if unit in ("reqps", "cps") else text


def colour(value: float, panel: Panel) -> str:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return COLOURS[[step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]]


def name(legend: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    return legend


def draw_stat(axes: Axes, panel: Panel, answers: list[Series]) -> None:
    current = [values[-1] for _, at, values in answers[0] if at[-1] * 60 > -STEP]
    value = current[0] if current else None
    unit, empty = (panel["fieldConfig"]["defaults"][name] for name in ("unit", "noValue"))
    text, ink = (empty, COLOURS["text"]) if value is None else (told(value, unit), colour(value, panel))
    axes.text(0.5, 0.42, text, ha="center", va="center", fontsize=23, color=ink, weight="bold", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_nothing(axes: Axes, panel: Panel) -> None:
    text = panel["fieldConfig"]["defaults"]["noValue"]
    axes.text(0.5, 0.5, text, ha="center", color=COLOURS["text"], transform=axes.transAxes)


def draw_lines(axes: Axes, panel: Panel, answers: list[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    lines = [
        (name(target["legendFormat"], labels), at, values)
        for target, series in zip(panel["targets"], answers, strict=True)
        for labels, at, values in series
    ]
    if not lines:
        draw_nothing(axes, panel)
    elif "stacking" in defaults["custom"]:
        times = sorted({moment for _, at, _ in lines for moment in at})
        heights = [[dict(zip(at, values, strict=True)).get(moment, 0.0) for moment in times] for _, at, values in lines]
        axes.stackplot(times, heights, labels=[label for label, _, _ in lines], alpha=0.75)
    else:
        for label, at, values in lines:
            axes.plot(at, values, label=label, linewidth=1.4)
    top = axes.get_ylim()[1]
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is not None and step["value"] < 3 * top:
            axes.axhline(step["value"], color=COLOURS[step["color"]], linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1] if lines else 1)  # room for the legend
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value, defaults["unit"])))
    if any(label for label, _, _ in lines):
        axes.legend(
            fontsize=7.5, loc="upper left", frameon=False, ncols=4, borderaxespad=0, handlelength=1.2, columnspacing=1
        )


def draw_heat_map(axes: Axes, panel: Panel, answers: list[Series]) -> None:
    """Cumulative buckets by `le` → how many fell into each."""
    rows = sorted(((float(labels["le"]), at, values) for labels, at, values in answers[0]), key=lambda row: row[0])
    if not rows:
        draw_nothing(axes, panel)
        return
    times = sorted({moment for _, at, _ in rows for moment in at})
    counts = np.array([[dict(zip(at, values, strict=True)).get(moment, 0.0) for moment in times] for _, at, values in rows])
    counts = np.diff(counts, axis=0, prepend=0)
    used = np.flatnonzero(counts.sum(1) > 0)
    used = np.arange(used[0], used[-1] + 1) if len(used) else np.arange(0)
    axes.pcolormesh(times, np.arange(len(used)), counts[used], cmap="Blues", shading="nearest")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_yticks(np.arange(len(used)), ["≤ " + told(rows[i][0], unit) for i in used])


def draw_table(axes: Axes, _: Panel, answers: list[Series]) -> None:
    columns = ("instance", "model", "version", "precision", "sha256")
    cells = [[labels.get(column, "")[:16] for column in columns] for labels, _, _ in answers[0]]
    table = axes.table(cells, colLabels=columns, loc="upper center", edges="horizontal", cellLoc="left")
    table.scale(1, 1.5)
    axes.set_xticks([])
    axes.set_yticks([])


DRAW = {"stat": draw_stat, "timeseries": draw_lines, "heatmap": draw_heat_map, "table": draw_table}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A dashboard's picture from its own queries.")
    parser.add_argument("dashboard", type=Path, help="a file of docker/grafana/dashboards")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=8)
    arguments = parser.parse_args()
    board = json.loads(arguments.dashboard.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] in DRAW]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ac"}
    figure = plt.figure(figsize=(15, 0.36 * height + 0.4))
    unit = 1 / height
    with httpx.Client(base_url=arguments.prometheus, timeout=30) as prometheus:
        for panel in panels:
            place = panel["gridPos"]
            left, wide = place["x"] / 24, place["w"] / 24
            low, high = 1 - (place["y"] + place["h"]) * unit, place["h"] * unit
            axes = figure.add_axes((left + 0.04, low + 0.95 * unit, wide - 0.05, high - 1.9 * unit))
            answers = [ask(prometheus, target["expr"], arguments.minutes) for target in panel["targets"]]
            DRAW[panel["type"]](axes, panel, answers)
            axes.set_title(panel["title"].replace("$stage", "total"), loc="left", fontsize=9, weight="bold")
            axes.tick_params(length=2, colors="#3d4450")
            if panel["type"] in ("timeseries", "heatmap"):
                axes.set_xlim(-arguments.minutes, 0)
                axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g} min" if minutes else "now"))
                axes.grid(axis="y", color="#e3e6ea", linewidth=0.6)
                axes.set_axisbelow(True)
    figure.savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
