"""The table of metrics: names, base units and buckets."""

import itertools
import re

from prometheus_client import Histogram

from app.api.problems import PROBLEMS
from app.telemetry.metrics import Metrics


def families() -> list:
    return [metric for metric in vars(Metrics()).values() if hasattr(metric, "describe")]


def test_every_metric_is_named_for_the_service_and_described():
    for metric in families():
        (family,) = metric.describe()
        assert re.fullmatch(r"pose_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|us|milliseconds|mb|percent)$", family.name)


def test_seconds_are_resolved_from_a_millisecond_to_ten_seconds():
    for metric in families():
        if isinstance(metric, Histogram) and metric.describe()[0].name.endswith("_seconds"):
            edges = metric._upper_bounds[:-1]
            assert (edges[0], edges[-1]) == (0.001, 10)
            assert all(after / before <= 1.61 for before, after in itertools.pairwise(edges))


def test_services_in_one_process_count_apart():
    first, second = Metrics(), Metrics()
    first.images.inc()
    assert first.registry.get_sample_value("pose_images_total") == 1
    assert second.registry.get_sample_value("pose_images_total") == 0


def test_what_the_service_may_fail_at_is_told_from_nought_on():
    told = Metrics().registry.get_sample_value
    own = {code: status for code, (status, _) in PROBLEMS.items() if status == 429 or status >= 500}
    assert [told("pose_rejected_total", {"code": code}) for code in own] == [0] * len(own)
    requests = [{"route": "/v1/pose", "method": "POST", "status": str(status)} for status in own.values()]
    requests.append({"route": "connection", "method": "other", "status": "503"})
    assert [told("pose_http_requests_total", labels) for labels in requests] == [0] * len(requests)
    assert [told("pose_dropped_crops_total", {"reason": reason}) for reason in ("deadline", "disconnect")] == [0, 0]


def test_a_first_failure_makes_no_new_series(start_service, t_pose):
    fresh = start_service()

    def series() -> list[str]:
        names = "pose_(http_requests|rejected|dropped_crops)_total"
        lines = re.findall(rf"^{names}(\{{.*\}}) ", fresh.client.get("/metrics").text, re.MULTILINE)
        return sorted(labels for _, labels in lines if "/v1/pose" in labels or "route" not in labels)

    before = series()
    late = {"boxes": "295,15,545,595", "timeout_ms": 1}
    answer = fresh.client.post("/v1/pose", params=late, content=t_pose, headers={"Content-Type": "image/jpeg"})
    assert (answer.status_code, series()) == (504, before)
