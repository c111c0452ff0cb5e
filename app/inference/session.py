"""ONNX Runtime sessions, and the one thread rule: the cores are counted once, and each lane runs on one thread.

ONNX Runtime, OpenCV and BLAS would each open a pool as large as the host; here none of them opens any, but for the few
threads that help with a crop beside which there is nothing to do, and sleep otherwise.
"""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import onnxruntime

from app.inference.model_store import ModelError, StoredModel

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")

Shape = Sequence[int | str]  # sides by their length, or by a name where any will do


def own_cgroup(root: Path = Path("/sys/fs/cgroup"), told: Path = Path("/proc/self/cgroup")) -> Path:
    """This process's cgroup: `root` in a container, whose own it is; outside, with v2, the folder that `told` names."""
    try:
        paths = [line.removeprefix("0::/") for line in told.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        paths = []
    return next((root / path for path in paths if (root / path).is_dir()), root)


_CGROUP = own_cgroup()


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use: the fewest of its CPU affinity and the quotas (v2 or v1) of its cgroup and of those
    that hold it, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in (cgroup, *cgroup.parents) if (quota := _quota(folder)) is not None]
    return max(1, min([affinity, *map(math.ceil, quotas)]))


def _quota(cgroup: Path) -> float | None:
    """The cgroup's CPU quota in cores; None where there is none."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return int(limit) / int(period)


def usable_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may use: the fewest of the machine's and the limits (v2 or v1) of its cgroup and of those that
    hold it."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in (cgroup, *cgroup.parents):
        for file in ("memory.max", "memory/memory.limit_in_bytes"):  # v2, v1
            with contextlib.suppress(OSError, ValueError):  # none, or "max"
                least = min(least, int((folder / file).read_text()))
    return least


def throttled_seconds(cgroup: Path = _CGROUP) -> float:
    """Seconds that the CPU quotas of the cgroup and of those that hold it have stopped threads since they were made; 0 where
    that is not told."""
    return sum(_throttled(folder) for folder in (cgroup, *cgroup.parents))


def _throttled(cgroup: Path) -> float:
    for file, name, units in (("cpu.stat", "throttled_usec", 1e6), ("cpu/cpu.stat", "throttled_time", 1e9)):  # v2, v1
        try:
            fields = dict(line.split() for line in (cgroup / file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if name in fields:
            return int(fields[name]) / units
    return 0.0


def take_one_thread_each() -> None:
    """Keep OpenCV from opening a thread pool of its own."""
    cv2.setNumThreads(1)


def open_session(onnx: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU that runs each call on the calling thread, and on so many less one of its own; `run` may be called
    by several threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A helper waits so long for its part of the next node before it sleeps: to be woken takes as long as a small node.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    # Or it would look for weights beside the graph in the working folder, and no sha256 covers those.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.log_severity_level = 4  # errors are raised as well; its own lines are no JSON
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def open_graph(stored: StoredModel, picture: Shape, *outputs: Shape) -> onnxruntime.InferenceSession:
    """A session of a stored model, once its graph takes batches of `picture`'s shape and gives such of each of `outputs`;
    sides with a name may have any length.

    Raises ModelError that names the model and the fault.
    """
    description = stored.description
    try:
        session = open_session(stored.onnx)
    except Exception as error:  # onnxruntime's errors share no class of their own
        raise ModelError(
            f"model {description.id}: model.onnx is not a graph that ONNX Runtime opens: {_reason(error)}"
        ) from error
    inputs, given = session.get_inputs(), session.get_outputs()
    if (
        len(inputs) != 1
        or inputs[0].type != "tensor(uint8)"
        or len(given) != len(outputs)
        or not all(each.type in _FLOATS for each in given)
        or not all(
            _fits(each.shape, ["N", *shape]) for each, shape in zip((*inputs, *given), (picture, *outputs), strict=True)
        )
    ):
        raise ModelError(
            f"model {description.id}: model.onnx must take uint8 {_batch_of(picture)} and give floats "
            f"{' and '.join(map(_batch_of, outputs))} as model.toml says, with any length where names stand here; it takes "
            f"{' and '.join(map(_told, inputs))} and gives {' and '.join(map(_told, given))}"
        )
    return session


def _reason(error: Exception) -> str:
    """What ONNX Runtime says is wrong with a graph, without the places in its source and the folders that it looked in."""
    said = " ".join(str(error).split()).split(" : ", 3)[-1]
    if "xternal data" in said:
        return "it keeps weights in another file; export it with external_data=False"
    return re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", said)[:300]


def _fits(shape: Sequence[Any], wanted: Shape) -> bool:
    """Whether a graph's shape is the wanted one, of which it leaves open what has a name."""
    return len(shape) == len(wanted) and all(
        given == side if isinstance(side, int) else not isinstance(given, int)
        for given, side in zip(shape, wanted, strict=True)
    )


def _batch_of(shape: Shape) -> str:
    return f"[N, {', '.join(map(str, shape))}]"


def _told(value: onnxruntime.NodeArg) -> str:
    """Type and shape of an input or output, such as `float [N, 17, 64, 48]`."""
    return f"{value.type.removeprefix('tensor(').removesuffix(')')} [{', '.join(map(str, value.shape))}]"
