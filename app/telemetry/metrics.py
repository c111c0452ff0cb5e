"""Every metric of the service, in one table. Base units, few labels; the buckets resolve p50…p99 of a CPU service."""

from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

STAGES = ("read", "decode", "detect", "crop", "queue", "infer", "keypoints", "encode", "total")

# 1 ms to 10 s, each at most 1.6 times the one before.
_SECONDS = (
    0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0,
    6.3, 10.0,
)  # fmt: skip
_CROPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_PEOPLE = (0, 1, 2, 3, 4, 6, 8, 12, 20, 50, 100)


class Metrics:
    """The service's metrics on a registry of their own, so that several services can live in one process (tests)."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        seconds = partial(histogram, buckets=_SECONDS)
        self.requests = counter("pose_http_requests", "HTTP requests answered.", ("route", "method", "status"))
        self.request_seconds = seconds(
            "pose_http_request_duration_seconds", "Seconds from a request's head to the end of its answer.", ("route",)
        )
        self.in_flight = gauge("pose_http_requests_in_flight", "HTTP requests being answered.")
        self.stage_seconds = seconds(
            "pose_stage_duration_seconds",
            "Seconds of an answered pose request in a stage, summed over its pictures and the threads at work for it.",
            ("stage",),
        )
        self.ready = gauge("pose_ready", "1 where the service takes work, as /readyz tells.")
        self.connections = gauge("pose_http_connections", "Open connections.")
        self.streams = gauge("pose_streams", "Open streams.")
        self.stream_frames = counter(
            "pose_stream_frames",
            "Frames of streams: answered, refused (no picture), late (no room, or past the deadline), failed by the "
            "service's fault, or skipped for newer ones.",
            ("outcome",),
        )
        self.stream_frame_seconds = seconds(
            "pose_stream_frame_duration_seconds", "Seconds from a frame's arrival to its answer."
        )
        self.images = counter("pose_images", "Pictures answered.")
        self.crops = counter("pose_crops", "People's crops that a pose network has run on.", ("model",))
        self.searched_images = counter(
            "pose_searched_images", "Pictures that a detector has searched for people.", ("model",)
        )
        self.batch_crops = histogram(
            "pose_batch_crops",
            "Crops that a network runs at once (with flip test also their mirrored ones; a detector's: one picture).",
            ("model",),
            buckets=_CROPS,
        )
        self.network_seconds = counter(
            "pose_inference_seconds", "Seconds that lanes ran a network, summed over the lanes.", ("model",)
        )
        self.queue_crops = gauge("pose_queue_crops", "Crops, and pictures to search, that wait for a lane.")
        self.admitted_crops = gauge(
            "pose_admitted_crops",
            "Crops that hold room in the queue: of pictures being decoded or searched, waiting or running.",
        )
        self.queue_limit = gauge("pose_queue_limit_crops", "Crops that may hold room in the queue.")
        self.lanes = gauge("pose_lanes", "Threads that run networks.")
        self.cpu_throttled = counter(
            "pose_cpu_throttled_seconds", "Seconds that CPU quotas have stopped its cgroup, or one that holds it."
        )
        self.memory_limit = gauge(
            "pose_memory_limit_bytes", "Bytes of memory that the cgroup, or else the machine, has for it."
        )
        self.queue_wait = seconds(
            "pose_queue_wait_seconds", "Seconds that a crop, or a picture to search, waited for a lane.", registry=registry
        )
        self.rejected = counter(
            "pose_rejected", "Requests refused, by problem code; probes and /metrics are left out.", ("code",)
        )
        self.dropped_crops = counter(
            "pose_dropped_crops", "Crops, and pictures to search, dropped before they ran.", ("reason",)
        )
        self.people_per_image = histogram("pose_people_per_image", "People in an answered picture.", buckets=_PEOPLE)
        self.workers_busy = gauge("pose_inference_workers_busy", "Lanes that are running a network.")
        self.lanes_replaced = counter("pose_inference_workers_replaced", "Lanes that died or stood still and were replaced.")
        self.capacity = gauge(
            "pose_crops_per_second_capacity",
            "Crops a second of one lane at its quickest so far, times the lanes.",
            ("model",),
        )
        self.model_info = gauge(
            "pose_model_info", "1 for each model that is served.", ("model", "version", "precision", "sha256")
        )
        self._start_failures()

    def count_pictures(self, people: Sequence[int]) -> None:
        """Count answered pictures by how many people are told of each."""
        self.images.inc(len(people))
        for count in people:
            self.people_per_image.observe(count)

    def _start_failures(self) -> None:
        """Let the series of failures that alerts watch start at 0: Prometheus sees no increase in the first value of one."""
        for status in (429, 499, 500, 503, 504):
            self.requests.labels("/v1/pose", "POST", status)
        self.requests.labels("connection", "other", 503)
        for code in ("queue_full", "internal_error", "not_ready", "shutting_down", "deadline_exceeded"):
            self.rejected.labels(code)
        for outcome in ("answered", "refused", "late", "failed", "skipped"):
            self.stream_frames.labels(outcome)
        for reason in ("deadline", "disconnect"):
            self.dropped_crops.labels(reason)
