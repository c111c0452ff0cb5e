"""What was measured: COCO's figures and PCK of one set, their 95 % intervals, the table for people and the one in model.toml.

The intervals are of the bootstrap over pictures: 1,000 times as many pictures are drawn with replacement, and AP is computed
from COCOeval's matches of each picture, which stay what they are. Differences are over the same draws.
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.files import write_whole

Float64 = npt.NDArray[np.float64]

_DRAWS = 1000
_SEED = 12


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The measures of one set, those with an interval for each draw of pictures [1000] too, and PCK by kind of joint."""

    people: int
    measures: dict[str, float]
    draws: dict[str, Float64]
    by_joint: dict[str, float]

    @property
    def figures(self) -> dict[str, float]:
        """All as numbers with names: people, ap, …, ap_low, ap_high."""
        figures = {"people": float(self.people), **self.measures}
        for name, draws in self.draws.items():
            figures[f"{name}_low"], figures[f"{name}_high"] = interval(draws)
        return figures


def interval(draws: Float64) -> tuple[float, float]:
    """The bounds between which 95 % of the draws lie."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def picture_draws(pictures: int) -> npt.NDArray[np.int64]:
    """How often each of the pictures is drawn, [1000, pictures]; the same at every call."""
    return np.random.default_rng(_SEED).multinomial(pictures, np.full(pictures, 1 / max(1, pictures)), size=_DRAWS)


def ap_draws(matches: list[dict[str, Any]], recalls: Float64) -> Float64:
    """AP [1000] over drawn pictures, from COCOeval's matches of each (`evalImgs` of one category and all sizes).

    COCOeval.accumulate with a weight for each picture: how often it was drawn.
    """
    scores = np.concatenate([match["dtScores"] for match in matches])
    order = np.argsort(-scores, kind="stable")
    picture = np.repeat(np.arange(len(matches)), [len(match["dtScores"]) for match in matches])[order]
    matched = np.concatenate([match["dtMatches"] for match in matches], axis=1)[:, order] > 0
    counted = ~np.concatenate([match["dtIgnore"] for match in matches], axis=1)[:, order].astype(bool)
    people = np.array([np.sum(np.asarray(match["gtIgnore"]) == 0) for match in matches])
    right, wrong = matched & counted, ~matched & counted
    results = np.zeros(_DRAWS)
    for draw, times in enumerate(picture_draws(len(matches))):
        weights = times[picture]
        hits, misses = np.cumsum(right * weights, axis=1), np.cumsum(wrong * weights, axis=1)
        precisions = hits / np.maximum(hits + misses, 1)
        precisions = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]
        recalled = hits / max(1, times @ people)
        padded = np.pad(precisions, ((0, 0), (0, 1)))  # beyond the highest recall precision is 0
        results[draw] = np.mean([row[np.searchsorted(r, recalls)] for row, r in zip(padded, recalled, strict=True)])
    return results


def share_draws(hits: list[npt.NDArray[np.bool_]]) -> Float64:
    """The share of hits [1000] over drawn pictures; `hits` are those of each picture."""
    draws = picture_draws(len(hits))
    found, all_ = np.array([h.sum() for h in hits]), np.array([h.size for h in hits])
    return np.asarray((draws @ found) / np.maximum(draws @ all_, 1))


def table(rows: dict[str, dict[str, float]]) -> str:
    """The figures of sets as a Markdown table."""
    lines = ["| set | people | AP | AP50 | AP75 | APM | APL | AR | PCK@0.2 |", "| --- " * 9 + "|"]
    for name, figures in rows.items():
        cells = [_cell(figures, key) for key in ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "pck")]
        lines.append(f"| {name} | {figures['people']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def joint_table(rows: dict[str, dict[str, float]]) -> str:
    """PCK by kind of joint as a Markdown table; empty where a row has no such joint labelled."""
    kinds = list(dict.fromkeys(kind for shares in rows.values() for kind in shares))
    lines = [f"|  | {' | '.join(kinds)} |", "| --- " * (1 + len(kinds)) + "|"]
    for name, shares in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{shares[kind]:.3f}' if kind in shares else '' for kind in kinds)} |")
    return "\n".join(lines)


def _cell(figures: dict[str, float], key: str) -> str:
    value = figures.get(key, -1.0)
    if value < 0:  # COCOeval's -1: no such people
        return ""
    bounds = f" [{figures[f'{key}_low']:.3f}, {figures[f'{key}_high']:.3f}]" if f"{key}_low" in figures else ""
    return f"{value:.3f}{bounds}"


def decoder_table(rows: dict[str, tuple[Accuracy, Accuracy]], kept: str) -> str:
    """Decoders of the same heatmaps, without and with flip test; differences of AP are to the decoder `kept`."""
    lines = ["| decoder | AP | AP50 | AP75 | AP − kept | AP, flip test | AP − kept |", "| --- " * 7 + "|"]
    for name, (plain, flipped) in rows.items():
        values = [plain.measures[key] for key in ("ap", "ap50", "ap75")]
        cells = [f"{value:.3f}" for value in values] + [difference(plain, rows[kept][0])]
        cells += [f"{flipped.measures['ap']:.3f}", difference(flipped, rows[kept][1])]
        lines.append(f"| {name}{', kept' if name == kept else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(one: Accuracy, other: Accuracy, measure: str = "ap") -> str:
    """How much more of a measure one has than the other, with the interval over the same pictures; empty for the same one.

    The basic bootstrap's: on the whole AP of draws lies above AP, whose precisions are maxima.
    """
    more = one.measures[measure] - other.measures[measure]
    low, high = interval(2 * more - (one.draws[measure] - other.draws[measure]))
    return "" if one is other else f"{more:+.3f} [{low:+.3f}, {high:+.3f}]"


def record(model_file: Path, rows: dict[str, dict[str, float]]) -> None:
    """Write figures into the accuracy tables of a model.toml; those of other sets stay. -1 (no such people) is left out."""
    text = model_file.read_text()
    sections = [text.split("[accuracy", 1)[0].rstrip()]
    for name, figures in (tomllib.loads(text).get("accuracy", {}) | rows).items():
        lines = [f"{key} = {round(value, 4)}" for key, value in figures.items() if value >= 0]
        sections.append("\n".join([f"[accuracy.{json.dumps(name, ensure_ascii=False)}]", *lines]))
    write_whole(model_file, "\n\n".join(sections) + "\n")
