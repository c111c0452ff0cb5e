"""What both trainers share: the learning rate, the order of an epoch, making one step ahead, averaged weights, the log."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from training.files import DataError

log = logging.getLogger("training")

T = TypeVar("T")
Members = list[tuple[int, int]]  # (set, index)


def learning_rate(peak: float, warm_up: int, step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * progress))))


def epoch_order(sets: Sequence[Sized], shares: list[float], seed: tuple[int, ...]) -> Members:
    """The (set, index) of one epoch in random order; a share of 1.5 takes everything once and a random half twice."""
    rng = np.random.default_rng(seed)
    members = []
    for which, (items, share) in enumerate(zip(sets, shares, strict=True)):
        times = np.full(len(items), int(share)) + (rng.random(len(items)) < share % 1)
        members += [(which, int(index)) for index in np.repeat(np.arange(len(items)), times)]
    return [members[i] for i in rng.permutation(len(members))]


def one_ahead(
    make: Callable[[int, Members], T],
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


def averaging(averaged: nn.Module, model: nn.Module) -> Callable[[float], None]:
    """A function that moves the averaged weights towards the model's; they keep so much of themselves.

    The tensors are listed once: listing them took most of the time of a step's averaging.
    """
    kept, new = averaged.state_dict(), model.state_dict()
    floats = [name for name, value in new.items() if value.is_floating_point()]
    counts = [name for name in new if name not in set(floats)]

    @torch.no_grad()
    def average(share: float) -> None:
        torch._foreach_lerp_([kept[name] for name in floats], [new[name] for name in floats], 1 - share)
        if counts:
            torch._foreach_copy_([kept[name] for name in counts], [new[name] for name in counts])

    return average


def write_line(run: Path, line: dict[str, Any]) -> None:
    """Add a line to the run's log.jsonl. Raises DataError; the file has no half line then."""
    log.info(json.dumps(line))
    file = run / "log.jsonl"
    try:
        with file.open("ab", buffering=0) as out:
            end = out.tell()
            content = (json.dumps(line) + "\n").encode()
            if out.write(content) < len(content):
                out.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error
