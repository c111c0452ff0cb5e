"""The autoscaler of scaling.yaml against a day's load: `python docker/k8s/simulate.py [--peak 278] [--people 3]`.

Time goes in steps of a second. People arrive by a day's curve with bursts; replicas run them at a fixed rate and refuse what
their queues have no room for; KEDA is asked every fifteen seconds for the busy lanes and the waiting crops of the last thirty
(the first two triggers, of which the second counts the running crops as well; the third, the guard, is not simulated), and a
new replica takes a while to be ready.
"""

import argparse
import math
import random
from collections import deque

DAY = 86_400
POLL, AVERAGED, TOLERANCE = 15, 30, 0.1  # the autoscaler of Kubernetes asks every 15 seconds
BUSY_GOAL, WAIT_GOAL = 0.7, 2.0  # share of the lanes; seconds of work waiting a replica
LEAST, MOST = 2, 60
QUEUE = 400  # crops a replica, POSE_QUEUE_CROPS
UP_PODS, DOWN_PERCENT = 4, 20  # the most of a step: so many more or twice as many; a fifth less, rounded up
UP_EVERY, DOWN_EVERY, CALM = 30, 60, 300  # seconds between steps up, between steps down, of smaller wishes before a step down


def arrivals(second: int, peak: float, rng: random.Random, burst: list[float]) -> float:
    """Crops that arrive in a second: a day from 10 % to 100 % of the peak, noise, and bursts of twice as much for minutes."""
    day = 0.55 - 0.45 * math.cos(2 * math.pi * (second / DAY - 4 / 24))
    if rng.random() < 8 / DAY:
        burst[0] = second + rng.uniform(60, 300)
    rate = peak * day * (2.0 if second < burst[0] else 1.0)
    return max(0.0, rng.gauss(rate, math.sqrt(rate)))


def simulate(peak: float, per_replica: float, start_seconds: int, fixed: int | None, seed: int = 1) -> dict[str, float]:
    """A day's figures: replica-hours, most replicas, the 99th percentile of waits (s), the shares over 1 s and refused."""
    rng, burst = random.Random(seed), [0.0]
    refused = total = 0.0
    replicas, queue = fixed or LEAST, 0.0
    starting: deque[tuple[int, int]] = deque()
    busy: deque[float] = deque(maxlen=AVERAGED)
    waiting: deque[float] = deque(maxlen=AVERAGED)
    wishes: deque[tuple[int, int]] = deque()
    last_up = last_down = -DAY
    seconds_of_replicas, most, waits = 0.0, replicas, []
    for second in range(DAY):
        while starting and starting[0][0] <= second:
            replicas += starting.popleft()[1]
        came = arrivals(second, peak, rng, burst)
        capacity = replicas * per_replica
        done = min(queue + came, capacity)
        queue += came - done
        total += came
        refused += max(0.0, queue - QUEUE * replicas)
        queue = min(queue, QUEUE * replicas)
        busy.append(done / per_replica)
        waiting.append(queue / per_replica)
        waits.append(queue / capacity)
        there = replicas + sum(count for _, count in starting)
        seconds_of_replicas += there
        most = max(most, there)
        if fixed or second % POLL:
            continue
        wanted = max(
            _wished(sum(busy) / len(busy) / BUSY_GOAL, there), _wished(sum(waiting) / len(waiting) / WAIT_GOAL, there), LEAST
        )
        wanted = min(wanted, MOST)
        wishes.append((second, wanted))
        while wishes[0][0] < second - CALM:
            wishes.popleft()
        calm = max(wish for _, wish in wishes)
        if wanted > there and second - last_up >= UP_EVERY:
            starting.append((second + start_seconds, min(wanted - there, max(UP_PODS, there))))
            last_up = second
        elif calm < there and not starting and second - last_down >= DOWN_EVERY:
            replicas -= min(there - calm, math.ceil(there * DOWN_PERCENT / 100))
            last_down = second
    waits.sort()
    return {
        "hours": seconds_of_replicas / 3600,
        "most": most,
        "p99": waits[DAY * 99 // 100],
        "over": sum(wait > 1 for wait in waits) / DAY,
        "refused": refused / total,
    }


def _wished(wish: float, there: int) -> int:
    """The autoscaler's number: what there is, while the wish is within its tolerance."""
    return there if abs(wish / there - 1) <= TOLERANCE else math.ceil(wish)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The autoscaler against a day's load.")
    parser.add_argument(
        "--peak", type=float, default=278, help="pictures a second at the day's peak (278: a million an hour)"
    )
    parser.add_argument("--people", type=float, default=3, help="people a picture")
    parser.add_argument("--per-replica", type=float, default=160, help="people a second that a replica of 2 cores answers")
    parser.add_argument("--start", type=int, default=20, help="seconds until a new replica is ready")
    arguments = parser.parse_args()
    peak = arguments.peak * arguments.people
    print("| replicas | most | replica-hours | wait p99 s | time with over 1 s of wait | refused |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fixed in (None, math.ceil(peak / arguments.per_replica), math.ceil(2 * peak / arguments.per_replica)):
        day = simulate(peak, arguments.per_replica, arguments.start, fixed)
        name = f"{fixed}, fixed" if fixed else "scaled"
        waits = f"{day['p99']:.2f} | {day['over']:.2%} | {day['refused']:.3%}"
        print(f"| {name} | {day['most']:.0f} | {day['hours']:.0f} | {waits} |")


if __name__ == "__main__":
    main()
