"""Every metric of the service, in one table. Base units, few labels; the buckets resolve p50…p99 of a CPU service."""

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
        self.requests = Counter(
            "pose_http_requests", "HTTP requests answered.", ("route", "method", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "pose_http_request_duration_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("pose_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        self.stage_seconds = Histogram(
            "pose_stage_duration_seconds",
            "Seconds of an answered pose request in a stage, summed over its pictures and the threads at work for it.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.ready = Gauge("pose_ready", "1 where the service takes work, as /readyz tells.", registry=registry)
        self.connections = Gauge("pose_http_connections", "Open connections.", registry=registry)
        self.streams = Gauge("pose_streams", "Open streams.", registry=registry)
        self.stream_frames = Counter(
            "pose_stream_frames",
            "Frames of streams: answered, refused, failed by the service's fault, or skipped for newer ones.",
            ("outcome",),
            registry=registry,
        )
        self.stream_frame_seconds = Histogram(
            "pose_stream_frame_duration_seconds",
            "Seconds from a frame's arrival to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("pose_images", "Pictures answered.", registry=registry)
        self.crops = Counter("pose_crops", "People's crops that a pose network has run on.", ("model",), registry=registry)
        self.searched_images = Counter(
            "pose_searched_images", "Pictures that a detector has searched for people.", ("model",), registry=registry
        )
        self.batch_crops = Histogram(
            "pose_batch_crops",
            "Crops in a call of a network (a detector's: one picture).",
            ("model",),
            buckets=_CROPS,
            registry=registry,
        )
        self.network_seconds = Counter(
            "pose_inference_seconds",
            "Seconds that lanes ran a network, summed over the lanes.",
            ("model",),
            registry=registry,
        )
        self.queue_crops = Gauge("pose_queue_crops", "Crops that wait for a lane.", registry=registry)
        self.admitted_crops = Gauge(
            "pose_admitted_crops",
            "Crops that hold room in the queue: of pictures being decoded or searched, waiting or running.",
            registry=registry,
        )
        self.queue_limit = Gauge("pose_queue_limit_crops", "Crops that may hold room in the queue.", registry=registry)
        self.lanes = Gauge("pose_lanes", "Threads that run networks.", registry=registry)
        self.cpu_throttled = Counter(
            "pose_cpu_throttled_seconds", "Seconds that the cgroup's CPU quota has stopped its threads.", registry=registry
        )
        self.memory_limit = Gauge(
            "pose_memory_limit_bytes", "Bytes of memory that the cgroup, or else the machine, has for it.", registry=registry
        )
        self.queue_wait = Histogram(
            "pose_queue_wait_seconds", "Seconds that a crop waited for a lane.", buckets=_SECONDS, registry=registry
        )
        self.rejected = Counter(
            "pose_rejected",
            "Requests refused, by problem code; probes and /metrics are left out.",
            ("code",),
            registry=registry,
        )
        self.dropped_crops = Counter("pose_dropped_crops", "Crops dropped before they ran.", ("reason",), registry=registry)
        self.people_per_image = Histogram(
            "pose_people_per_image", "People in an answered picture.", buckets=_PEOPLE, registry=registry
        )
        self.workers_busy = Gauge("pose_inference_workers_busy", "Lanes that are running a network.", registry=registry)
        self.lanes_replaced = Counter(
            "pose_inference_workers_replaced", "Lanes that died or stood still and were replaced.", registry=registry
        )
        self.capacity = Gauge(
            "pose_crops_per_second_capacity",
            "Crops a second of one lane at its quickest, measured at warm-up, times the lanes.",
            ("model",),
            registry=registry,
        )
        self.model_info = Gauge(
            "pose_model_info",
            "1 for each model that is served.",
            ("model", "version", "precision", "sha256"),
            registry=registry,
        )
        self._start_failures()

    def _start_failures(self) -> None:
        """Let the series of the service's own failures start at 0: Prometheus sees no increase in the first value of one."""
        for status in (429, 500, 503, 504):
            self.requests.labels("/v1/pose", "POST", status)
        self.requests.labels("connection", "other", 503)
        for code in ("queue_full", "internal_error", "not_ready", "shutting_down", "deadline_exceeded"):
            self.rejected.labels(code)
        for outcome in ("answered", "refused", "failed", "skipped"):
            self.stream_frames.labels(outcome)
        for reason in ("deadline", "disconnect"):
            self.dropped_crops.labels(reason)
