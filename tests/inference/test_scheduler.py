"""The scheduler: fair batches, one answer for every request, and lanes that die or stand still."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from app.inference import scheduler
from app.inference.admission import QueueFull, TooManyCrops
from app.inference.scheduler import (
    BatchFailed,
    BatchResult,
    LaneLost,
    Network,
    Scheduler,
    ShuttingDown,
)
from app.telemetry.metrics import Metrics

Run = Callable[[np.ndarray], BatchResult]


def crops(*values: int) -> np.ndarray:
    """Crops [N, 1] that are known by their values."""
    return np.array(values, np.uint8).reshape(-1, 1)


def doubled(batch: np.ndarray) -> BatchResult:
    return BatchResult(batch.astype(np.float32) * 2, 0.001, 0.002)


def soon(seconds: float = 30) -> float:
    return asyncio.get_running_loop().time() + seconds


class Gate:
    """A network whose calls wait until it is opened; `batches` are the values of each call."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.opened = threading.Event()
        self.network = Network("gate", self._run)

    def _run(self, batch: np.ndarray) -> BatchResult:
        self.batches.append(batch[:, 0].tolist())
        assert self.opened.wait(20)
        return doubled(batch)


def drive(
    work: Callable[[Scheduler], Coroutine[Any, Any, None]], lanes: int = 1, queue: int = 100, batch: int = 4
) -> Metrics:
    """Run `work` with a scheduler that is started and stopped; the metrics that it left."""
    metrics = Metrics()

    async def main() -> None:
        running = Scheduler(lanes, queue, batch, metrics)
        running.start()
        try:
            await asyncio.wait_for(work(running), 20)
        finally:
            await running.stop()

    asyncio.run(main())
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - threads make it true, and set no event of the loop
            await asyncio.sleep(0.002)


async def held(s: Scheduler, *values: int) -> tuple[Gate, asyncio.Task]:
    """A gate, and a request of crops at it, the first of which a lane holds."""
    gate = Gate()
    job = asyncio.create_task(s.run(gate.network, crops(*values), soon()))
    await until(lambda: bool(gate.batches))
    return gate, job


def test_results_are_given_in_the_order_of_the_crops():
    async def work(s: Scheduler) -> None:
        ticket = await s.run(Network("n", doubled), crops(*range(11)), soon())
        assert [float(v[0]) for v in ticket.results] == [2.0 * i for i in range(11)]

    metrics = drive(work, lanes=2)
    assert value(metrics, "pose_crops_total", model="n") == 11
    assert value(metrics, "pose_queue_crops") == 0
    assert value(metrics, "pose_inference_workers_busy") == 0


def test_a_ticket_tells_how_long_it_waited_and_the_seconds_of_all_its_batches():
    async def work(s: Scheduler) -> None:
        gate, blocker = await held(s, 99)
        job = asyncio.create_task(s.run(gate.network, crops(*range(8)), soon()))
        await until(lambda: s.waiting == 8)
        await asyncio.sleep(0.1)
        gate.opened.set()
        _, ticket = await asyncio.gather(blocker, job)
        assert gate.batches[1:] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert ticket.queue_seconds > 0.09
        assert (ticket.infer_seconds, ticket.keypoint_seconds) == pytest.approx((2 * 0.001, 2 * 0.002))

    assert value(drive(work), "pose_queue_wait_seconds_sum") > 0.7  # of 8 crops


def test_a_request_waits_until_its_last_crop_is_taken_and_has_its_share_of_a_batch():
    async def work(s: Scheduler) -> None:
        gate, many = await held(s, *range(5))
        one = asyncio.create_task(s.run(gate.network, crops(9), soon()))
        await until(lambda: s.waiting == 2)
        await asyncio.sleep(0.1)
        gate.opened.set()
        first, second = await asyncio.gather(many, one)
        assert gate.batches == [[0, 1, 2, 3], [4, 9]]
        assert first.queue_seconds > 0.09
        assert (first.infer_seconds, second.infer_seconds) == pytest.approx((0.0015, 0.0005))

    drive(work)


def test_a_request_does_not_wait_for_itself():
    started: list[float] = []

    def slow(batch: np.ndarray) -> BatchResult:
        started.append(time.monotonic())
        time.sleep(0.05)
        return BatchResult(batch.astype(np.float32), 0.05, 0.0)

    async def work(s: Scheduler) -> None:
        asked = time.monotonic()
        ticket = await s.run(Network("slow", slow), crops(*range(20)), soon())
        assert ticket.infer_seconds == pytest.approx(0.25)
        assert ticket.queue_seconds < started[-1] - asked - 0.15  # less the 0.2 s in which its other crops ran

    drive(work)


def test_a_request_does_not_wait_for_what_another_lane_runs_of_it():
    def slow(batch: np.ndarray) -> BatchResult:
        started = time.monotonic()
        time.sleep(0.4 if batch[0, 0] else 0.2)
        return BatchResult(batch.astype(np.float32), time.monotonic() - started, 0.0)

    async def work(s: Scheduler) -> None:
        ticket = await s.run(Network("slow", slow, counts="pictures"), crops(0, 1, 2), soon())
        assert ticket.queue_seconds < 0.1  # the third is taken after 0.2 s, in which both lanes ran its siblings

    drive(work, lanes=2)


def test_a_request_without_crops_is_answered_at_once():
    async def work(s: Scheduler) -> None:
        assert (await s.run(Network("n", doubled), crops(), soon())).results == []

    drive(work)


def test_a_crop_beside_which_there_is_nothing_to_do_has_all_cores():
    ways: list[str] = []

    def way(name: str) -> Run:
        def run(batch: np.ndarray) -> BatchResult:
            ways.append(name)
            return doubled(batch)

        return run

    async def work(s: Scheduler) -> None:
        network, gate = Network("n", way("plain"), way("alone")), Gate()
        assert (await s.run(network, crops(3), soon())).results == [6]
        assert ways == ["alone"]
        await s.run(network, crops(1, 2), soon())
        assert ways[1:] == ["plain"] * 2
        held = asyncio.create_task(s.run(gate.network, crops(1), soon()))
        await until(lambda: bool(gate.batches))
        await s.run(network, crops(1), soon())
        assert ways[3:] == ["plain"]
        gate.opened.set()
        await held
        await s.run(network, crops(1), soon())
        assert ways[4:] == ["alone"]

    drive(work, lanes=2)


def test_crops_of_concurrent_requests_share_a_batch():
    async def work(s: Scheduler) -> None:
        gate = Gate()
        jobs = [asyncio.create_task(s.run(gate.network, crops(i), soon())) for i in range(5)]
        await until(lambda: len(gate.batches) == 1)
        gate.opened.set()
        await asyncio.gather(*jobs)
        assert gate.batches == [[0], [1, 2, 3, 4]]

    metrics = drive(work)
    assert value(metrics, "pose_batch_crops_count", model="gate") == 2


def test_waiting_requests_are_served_one_crop_each_in_turn():
    async def work(s: Scheduler) -> None:
        gate, blocker = await held(s, 99)
        large = asyncio.create_task(s.run(gate.network, crops(10, 11, 12, 13, 14, 15), soon()))
        small = asyncio.create_task(s.run(gate.network, crops(20), soon()))
        pair = asyncio.create_task(s.run(gate.network, crops(30, 31), soon()))
        await until(lambda: s.waiting == 9)
        gate.opened.set()
        await asyncio.gather(blocker, large, small, pair)
        assert gate.batches[1:] == [[10, 20, 30], [11, 31, 12], [13, 14, 15]]

    drive(work, batch=3)


def test_a_large_request_is_dealt_out_to_all_lanes():
    async def work(s: Scheduler) -> None:
        gate = Gate()
        blockers = [asyncio.create_task(s.run(gate.network, crops(i), soon())) for i in (98, 99)]
        await until(lambda: len(gate.batches) == 2)
        job = asyncio.create_task(s.run(gate.network, crops(1, 2, 3, 4), soon()))
        await until(lambda: s.waiting == 4)
        gate.opened.set()
        await asyncio.gather(*blockers, job)
        assert sorted(map(len, gate.batches[2:])) in ([2, 2], [1, 1, 2])

    drive(work, lanes=2, batch=4)


def test_crops_for_other_networks_share_no_batch_and_keep_their_turn():
    async def work(s: Scheduler) -> None:
        a, b = Gate(), Gate()
        jobs = [asyncio.create_task(s.run(a.network, crops(0), soon()))]
        await until(lambda: len(a.batches) == 1)
        jobs += [
            asyncio.create_task(s.run(network, crops(i), soon()))
            for i, network in enumerate((b.network, a.network, b.network, a.network), 1)
        ]
        await until(lambda: s.waiting == 4)
        a.opened.set()
        b.opened.set()
        await asyncio.gather(*jobs)
        assert (a.batches, b.batches) == ([[0], [2, 4]], [[1, 3]])

    drive(work)


def test_a_batch_that_fails_answers_every_member():
    def broken(batch: np.ndarray) -> BatchResult:
        raise ValueError(batch)

    async def work(s: Scheduler) -> None:
        gate, blocker = await held(s, 0)
        network = Network("broken", broken)
        jobs = [asyncio.create_task(s.run(network, crops(i), soon())) for i in (1, 2, 3)]
        await until(lambda: s.waiting == 3)
        gate.opened.set()
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [BatchFailed] * 3
        assert [type(outcome.__cause__) for outcome in outcomes] == [ValueError] * 3
        await blocker
        assert len((await s.run(Network("n", doubled), crops(1), soon())).results) == 1

    drive(work)


def test_a_batch_that_fails_has_kept_its_lane_at_work():
    def slow(batch: np.ndarray) -> BatchResult:
        time.sleep(0.2)
        raise ValueError(batch)

    async def work(s: Scheduler) -> None:
        with pytest.raises(BatchFailed):
            await s.run(Network("broken", slow), crops(1), soon())

    assert 0.2 <= value(drive(work), "pose_inference_seconds_total", model="broken") < 10


def test_the_quickest_batch_of_a_network_is_remembered():
    waits = iter((1.5, 0.02, 1.5))

    def run(batch: np.ndarray) -> BatchResult:
        time.sleep(next(waits))
        return doubled(batch)

    async def work(s: Scheduler) -> None:
        network = Network("n", run)
        s.quickest[network] = 5  # of a warm-up on cores that others used
        for _ in range(3):
            await s.run(network, crops(1), soon())
        assert 0.02 <= s.quickest[network] < 1

    drive(work)


def test_a_batch_during_which_the_process_was_stopped_tells_nothing_of_its_speed(monkeypatch):
    monkeypatch.setattr(scheduler, "_TEND_SECONDS", 0.01)

    async def work(s: Scheduler) -> None:
        gate, job = await held(s, 1)
        time.sleep(1.3)  # noqa: ASYNC251 - as if the process were stopped
        await asyncio.sleep(0.1)
        gate.opened.set()
        await job
        assert s.quickest == {}

    drive(work)


def test_a_batch_that_fails_when_its_callers_have_left_is_logged_all_the_same(caplog):
    gate = threading.Event()

    def broken(batch: np.ndarray) -> BatchResult:
        assert gate.wait(20)
        raise ValueError("nobody waits for this")

    async def work(s: Scheduler) -> None:
        with pytest.raises(TimeoutError):
            await s.run(Network("broken", broken), crops(1), soon(0.02))
        gate.set()
        await s.run(Network("n", doubled), crops(1), soon())

    drive(work)
    assert "nobody waits for this" in caplog.text


def test_a_large_request_of_which_one_batch_fails_is_answered_once_and_its_rest_is_skipped():
    seen = []

    def fails_at_two(batch: np.ndarray) -> BatchResult:
        seen.extend(batch[:, 0].tolist())
        if 2 in batch:
            raise ValueError("two")
        return doubled(batch)

    async def work(s: Scheduler) -> None:
        with pytest.raises(BatchFailed):
            await s.run(Network("n", fails_at_two), crops(0, 1, 2, 3, 4, 5, 6, 7), soon())
        assert s.waiting == 0

    drive(work, batch=2)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("fatal", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_lane_that_dies_answers_its_members_and_is_replaced(fatal):
    def dying(batch: np.ndarray) -> BatchResult:
        raise fatal

    async def work(s: Scheduler) -> None:
        with pytest.raises(LaneLost):
            await s.run(Network("dying", dying), crops(1, 2), soon())
        assert len((await s.run(Network("n", doubled), crops(1, 2, 3), soon())).results) == 3
        assert s.ready

    assert value(drive(work), "pose_inference_workers_replaced_total") == 1


def test_a_lane_that_stands_still_answers_its_members_and_is_replaced(monkeypatch):
    monkeypatch.setattr(scheduler, "_TEND_SECONDS", 0.01)
    monkeypatch.setattr(scheduler, "_STALLED_SECONDS", 1.0)
    monkeypatch.setattr(scheduler, "_STALLED_TIMES", 1)
    gate = Gate()

    async def work(s: Scheduler) -> None:
        stalled = asyncio.create_task(s.run(gate.network, crops(1), soon()))
        await until(lambda: len(gate.batches) == 1)
        waiting = asyncio.create_task(s.run(Network("n", doubled), crops(2), soon()))
        with pytest.raises(LaneLost):
            await stalled
        assert len((await waiting).results) == 1
        assert not s.ready  # the one core is lost to the old lane
        assert value(s._metrics, "pose_inference_workers_busy") == 0  # as no lane of today's is
        gate.opened.set()  # the old lane comes back and must change nothing
        await until(lambda: s.ready)
        assert len((await s.run(Network("n", doubled), crops(3), soon())).results) == 1

    metrics = drive(work)
    assert value(metrics, "pose_inference_workers_replaced_total") == 1
    assert value(metrics, "pose_inference_workers_busy") == 0


def test_a_result_that_is_none_of_a_networks_is_a_failed_batch():
    for wrong in (lambda batch: doubled(batch[:-1]), lambda _: None):

        async def work(s: Scheduler, run: Run = wrong) -> None:
            with pytest.raises(BatchFailed) as failed:
                await s.run(Network("wrong", run), crops(1, 2), soon(5))
            assert str(failed.value.__cause__) == "it gave no result of as many crops"  # for the log
            assert len((await s.run(Network("n", doubled), crops(1), soon())).results) == 1

        assert value(drive(work), "pose_inference_workers_replaced_total") == 0  # the lane is as good as before


def test_pictures_are_run_one_by_one_whatever_their_shapes():
    async def work(s: Scheduler) -> None:
        shapes = Network("n", lambda batch: BatchResult(np.array([batch.shape], np.float32), 0.0, 0.0), counts="pictures")
        ticket = await s.run(shapes, [np.zeros((2, 3), np.uint8), np.zeros((5, 1), np.uint8)], soon())
        assert [result.tolist() for result in ticket.results] == [[1, 2, 3], [1, 5, 1]]

    drive(work)


def test_a_lane_at_work_does_not_keep_the_scheduler_from_stopping(monkeypatch):
    monkeypatch.setattr(scheduler, "_STOP_SECONDS", 0.1)

    async def main() -> None:
        running = Scheduler(1, 100, 4, Metrics())
        running.start()
        gate, job = await held(running, 1)
        try:
            await asyncio.wait_for(running.stop(), 5)
        finally:
            gate.opened.set()
            await job

    asyncio.run(main())


def test_work_whose_deadline_has_passed_is_dropped_before_it_runs():
    async def work(s: Scheduler) -> None:
        gate, blocker = await held(s, 0)
        with pytest.raises(TimeoutError):
            await s.run(gate.network, crops(1, 2, 3), soon(0.02))
        assert s.waiting == 0
        gate.opened.set()
        await blocker
        assert gate.batches == [[0]]

    metrics = drive(work)
    assert value(metrics, "pose_dropped_crops_total", reason="deadline") == 3


def test_a_deadline_that_has_passed_already_runs_nothing():
    async def work(s: Scheduler) -> None:
        gate = Gate()
        with pytest.raises(TimeoutError):
            await s.run(gate.network, crops(1), soon(-1))
        assert gate.batches == []
        assert s.waiting == 0

    assert value(drive(work), "pose_dropped_crops_total", reason="deadline") == 1


def test_work_whose_client_is_gone_is_dropped_before_it_runs():
    async def work(s: Scheduler) -> None:
        gate, blocker = await held(s, 0)
        leaving = asyncio.create_task(s.run(gate.network, crops(1, 2), soon()))
        staying = asyncio.create_task(s.run(gate.network, crops(3), soon()))
        await until(lambda: s.waiting == 3)
        leaving.cancel()
        await asyncio.wait({leaving})
        gate.opened.set()
        await asyncio.gather(blocker, staying)
        assert gate.batches == [[0], [3]]

    metrics = drive(work)
    assert value(metrics, "pose_dropped_crops_total", reason="disconnect") == 2


def test_a_full_queue_refuses_at_once_and_says_when_to_return():
    async def work(s: Scheduler) -> None:
        with s.admission.admit(3):
            with pytest.raises(QueueFull) as full, s.admission.admit(3):
                pass
            assert full.value.retry_after >= 1
            with s.admission.admit(2):
                assert s.admission.admitted == 5
        with s.admission.admit(5):
            pass
        assert s.admission.admitted == 0

    drive(work, queue=5)


def test_room_that_newcomers_leave_is_for_those_who_are_there():
    async def work(s: Scheduler) -> None:
        with s.admission.admit(4, leave=2) as room, s.admission.admit(2, leave=2):
            with pytest.raises(QueueFull), s.admission.admit(1, leave=2):
                pass
            room.resize(6)
            assert s.admission.admitted == 8
        assert s.admission.admitted == 0

    drive(work, queue=8)


def test_a_network_that_fails_now_and_then_is_not_tried():
    tried: list[bool] = []

    def fails_but_at_one(batch: np.ndarray) -> BatchResult:
        tried.extend((batch == 0).all(axis=tuple(range(1, batch.ndim))))
        if (batch == 1).all():
            return doubled(batch)
        raise ValueError(batch)

    async def work(s: Scheduler) -> None:
        network = Network("n", fails_but_at_one)
        for value in (2, 3, 1, 4, 5, 1):
            await asyncio.gather(s.run(network, crops(value), soon()), return_exceptions=True)
        await asyncio.sleep(0.02)
        assert s.ready

    drive(work)
    assert tried == [False] * 6


def test_a_network_that_fails_on_zeros_too_makes_the_scheduler_unready_until_it_does_not():
    broken = True

    def run(batch: np.ndarray) -> BatchResult:
        if broken or batch.any():
            raise ValueError("no memory")
        return doubled(batch)

    async def fail(s: Scheduler, network: Network, times: int) -> None:
        for _ in range(times):
            with pytest.raises(BatchFailed):
                await s.run(network, crops(1), soon())

    async def work(s: Scheduler) -> None:
        nonlocal broken
        network = Network("n", run)
        await fail(s, network, 2)
        await asyncio.sleep(0.05)
        assert s.ready
        await fail(s, network, 1)
        await until(lambda: not s.ready)
        broken = False
        await until(lambda: s.ready)
        await fail(s, network, 10)  # by what is in their crops
        await asyncio.sleep(0.05)
        assert s.ready

    drive(work)


def test_a_network_whose_trial_kills_a_lane_is_tried_again(caplog):
    trials = 0

    def run(batch: np.ndarray) -> BatchResult:
        nonlocal trials
        if batch.any():
            raise ValueError("at fault")
        trials += 1
        if trials == 1:
            raise SystemExit
        return doubled(batch)

    async def work(s: Scheduler) -> None:
        network = Network("n", run)
        for _ in range(3):
            with pytest.raises(BatchFailed):
                await s.run(network, crops(1), soon())
        await until(lambda: trials == 2)
        assert s.ready

    drive(work)
    assert "the network n gave nothing for zeros in time" in caplog.text


def test_a_network_that_is_tried_beside_crops_that_are_at_fault_is_not_called_failing():
    def run(batch: np.ndarray) -> BatchResult:
        time.sleep(0.002)
        if batch.any():
            raise ValueError("one of them is at fault")
        return doubled(batch)

    async def work(s: Scheduler) -> None:
        network, until = Network("n", run), time.monotonic() + 0.5

        async def client() -> None:
            while time.monotonic() < until:
                with pytest.raises(BatchFailed):
                    await s.run(network, crops(1, 1, 1, 1), soon())
                assert s.ready

        await asyncio.gather(*(client() for _ in range(4)))

    drive(work)


def test_a_network_whose_batches_fail_while_the_scheduler_stops_is_not_tried_any_more():
    async def main() -> None:
        opened, batches = threading.Event(), 0

        def run(batch: np.ndarray) -> BatchResult:
            nonlocal batches
            batches += 1
            assert opened.wait(20)
            raise ValueError("no memory")

        network, s = Network("n", run), Scheduler(3, 100, 4, Metrics())
        s.start()
        jobs = [asyncio.create_task(s.run(network, crops(1), soon())) for _ in range(3)]
        await until(lambda: batches == 3)
        stopping = asyncio.create_task(s.stop())
        await asyncio.sleep(0.01)
        opened.set()
        await stopping
        assert [type(error) for error in await asyncio.gather(*jobs, return_exceptions=True)] == [BatchFailed] * 3
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert batches == 3

    asyncio.run(main())


def test_a_request_that_would_be_late_is_refused_at_once_and_told_when_it_would_not():
    async def work(s: Scheduler) -> None:
        s.admission.seconds_per_crop = 0.1
        with s.admission.admit(50, deadline=soon(2)), s.admission.admit(45, deadline=soon(2)):  # late alone, and tried
            pass
        with (
            s.admission.admit(60, deadline=soon(2)),
            s.admission.admit(16, deadline=soon(2)),
        ):  # one turn after each of the 16
            pass
        with s.admission.admit(30, deadline=soon(9)), s.admission.admit(30, deadline=soon(9)):
            with s.admission.admit(10, deadline=soon(2)):  # a turn of both after each of the 10
                pass
            with pytest.raises(QueueFull, match="no time") as full, s.admission.admit(14, deadline=soon(2)):
                pass
            assert full.value.retry_after == 1
            with s.admission.admit(14, deadline=soon(9)), s.admission.admit(1, deadline=soon(2)):
                assert s.admission.admitted == 75
        assert s.admission.admitted == 0

    drive(work, lanes=2)


def test_room_is_given_back_by_a_request_that_fails():
    async def work(s: Scheduler) -> None:
        with pytest.raises(KeyError), s.admission.admit(5):
            raise KeyError
        with s.admission.admit(5):
            pass

    drive(work, queue=5)


def test_room_is_given_back_crop_by_crop_as_they_run():
    """So that what a refused client is told of the seconds until there is room is true."""
    seen: list[int] = []

    async def work(s: Scheduler) -> None:
        def counted(batch: np.ndarray) -> BatchResult:
            seen.append(s.admission.admitted)
            return doubled(batch)

        with s.admission.admit(6) as room:
            await s.run(Network("n", counted), crops(1, 2, 3, 4, 5, 6), soon(), room)
            assert (s.admission.admitted, room.crops) == (0, 0)

    drive(work, queue=6, batch=2)
    assert seen == [6, 4, 2]


def test_the_time_until_there_is_room_is_told_from_the_measured_rate():
    async def work(s: Scheduler) -> None:
        s.admission.seconds_per_crop = 0.5
        with s.admission.admit(10), pytest.raises(QueueFull) as full, s.admission.admit(8):
            pass
        assert full.value.retry_after == 2  # 8 crops on 2 lanes

    drive(work, lanes=2, queue=10)


def test_the_rate_follows_the_batches():
    async def work(s: Scheduler) -> None:
        network = Network("n", doubled)
        s.admission.seconds_per_crop = 10  # of a warm-up on cores that others used
        await s.run(network, crops(1), soon())
        assert s.admission.seconds_per_crop == pytest.approx(
            1.9 * s.quickest[network]
        )  # of twice the batch's, a tenth nearer
        s.admission.seconds_per_crop, slow = 0.001, Network("slow", lambda batch: time.sleep(0.02) or doubled(batch))
        await s.run(slow, crops(1), soon())
        assert s.admission.seconds_per_crop == pytest.approx(0.9 * 0.001 + 0.1 * s.quickest[slow])

    drive(work)


def test_a_crop_that_all_cores_ran_tells_the_most_that_a_lane_takes():
    async def work(s: Scheduler) -> None:
        network = Network("n", doubled, lambda batch: time.sleep(0.05) or doubled(batch))
        for rate in (1.0, 0.05):
            s.admission.seconds_per_crop = rate
            ticket = await s.run(network, crops(1), soon())
            assert ticket.results == [2]
            assert 0.05 <= s.admission.seconds_per_crop < 1
        assert s.admission.seconds_per_crop == 0.05  # one lane by itself may well be as quick
        assert network not in s.quickest

    drive(work, lanes=2)


def test_a_scheduler_that_was_never_started_can_be_stopped():
    asyncio.run(Scheduler(2, 10, 4, Metrics()).stop())


def test_more_crops_than_the_queue_holds_are_told_from_a_full_queue():
    async def work(s: Scheduler) -> None:
        with s.admission.admit(4), pytest.raises(TooManyCrops), s.admission.admit(6, deadline=soon(0.4)):  # nor by time
            pass
        with pytest.raises(TooManyCrops, match=r"6 .* 5"), s.admission.admit(6):
            pass

    drive(work, queue=5)


def test_stopping_answers_what_still_waits():
    async def main() -> None:
        s = Scheduler(1, 100, 4, Metrics())
        s.start()
        gate, running = await held(s, 0)
        waiting = asyncio.create_task(s.run(gate.network, crops(1), soon()))
        await until(lambda: s.waiting == 1)
        stopping = asyncio.create_task(s.stop())
        with pytest.raises(ShuttingDown):
            await waiting
        gate.opened.set()
        await asyncio.gather(stopping, running)
        assert not s.ready
        with pytest.raises(ShuttingDown):  # and of what comes after it
            await s.run(gate.network, crops(2), soon())
        assert gate.batches == [[0]]

    asyncio.run(main())


def test_requests_that_fail_together_have_exceptions_of_their_own():
    """One for all would hold the frames of each, and whoever empties them ends another's."""

    def broken(_: np.ndarray) -> BatchResult:
        raise SystemExit

    async def work(s: Scheduler) -> None:
        gate, first = await held(s, 1)
        network = Network("broken", broken)
        others = [asyncio.create_task(s.run(network, crops(i), soon())) for i in range(3)]
        await asyncio.sleep(0)
        gate.opened.set()
        await first
        errors = await asyncio.gather(*others, return_exceptions=True)
        assert all(isinstance(error, LaneLost) for error in errors)
        assert len({id(error) for error in errors}) == 3

    drive(work)


def test_crops_whose_callers_deadline_is_the_same_are_dropped_by_the_deadline():
    async def work(s: Scheduler) -> None:
        gate, first = await held(s, 1)
        deadline = soon(0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await s.run(gate.network, crops(2, 3), deadline)
        gate.opened.set()
        await first

    metrics = drive(work)
    assert value(metrics, "pose_dropped_crops_total", reason="deadline") == 2
    assert value(metrics, "pose_dropped_crops_total", reason="disconnect") == 0


def test_lanes_do_not_stand_still_while_the_whole_process_is_stopped(monkeypatch):
    monkeypatch.setattr(scheduler, "_STALLED_SECONDS", 1.5)

    async def work(s: Scheduler) -> None:
        gate, job = await held(s, 1)
        await asyncio.sleep(0.3)
        time.sleep(2)  # noqa: ASYNC251 - of the loop's thread, which cannot tell it from a stop
        await asyncio.sleep(0.5)
        gate.opened.set()
        await job

    assert value(drive(work), "pose_inference_workers_replaced_total") == 0


def test_a_batch_that_begins_after_a_stop_of_the_loop_is_answered():
    """Its time does not begin in the future: less than none could not be counted."""

    async def work(s: Scheduler) -> None:
        network = Network("x/1", lambda batch: (time.sleep(0.3), doubled(batch))[1])
        jobs = [asyncio.create_task(s.run(network, crops(number), soon())) for number in range(3)]
        await asyncio.sleep(0.1)
        time.sleep(1.6)  # noqa: ASYNC251 - meanwhile the first is ready
        await asyncio.wait_for(asyncio.gather(*jobs), 10)
        assert s.admission.seconds_per_crop > 0

    drive(work, batch=1)


def test_a_large_batch_may_take_longer_than_a_small_one(monkeypatch):
    monkeypatch.setattr(scheduler, "_STALLED_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "_STALLED_TIMES", 1)
    monkeypatch.setattr(scheduler, "_TEND_SECONDS", 0.01)

    async def work(s: Scheduler) -> None:
        s.admission.seconds_per_crop = 0.2
        gate = Gate()
        job = asyncio.create_task(s.run(gate.network, crops(1, 2, 3, 4), soon()))
        await asyncio.sleep(0.4)
        gate.opened.set()
        await job
        assert gate.batches == [[1, 2, 3, 4]]

    assert value(drive(work), "pose_inference_workers_replaced_total") == 0


@pytest.mark.parametrize("of_all", [True, False])
def test_a_slow_network_is_not_taken_for_one_that_stands_still(monkeypatch, of_all):
    monkeypatch.setattr(scheduler, "_STALLED_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "_TEND_SECONDS", 0.01)

    async def work(s: Scheduler) -> None:
        gate = Gate()
        if of_all:
            s.admission.seconds_per_crop = 1  # 50 times that is the limit
        else:  # others are quick
            s.quickest[gate.network] = 1
        job = asyncio.create_task(s.run(gate.network, crops(1), soon()))
        await asyncio.sleep(0.3)
        gate.opened.set()
        await job

    assert value(drive(work), "pose_inference_workers_replaced_total") == 0
