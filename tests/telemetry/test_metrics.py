"""The table of metrics: names, base units and buckets."""

import itertools
import re

from prometheus_client import Histogram

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
