"""Writes the dashboards beside it: `python docker/grafana/dashboards.py`. Grafana reads the JSON; people read this."""

import json
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
POSE = 'route="/v1/pose",instance=~"$instance"'
WITH_REFUSED = 'route=~"/v1/pose|connection",instance=~"$instance"'  # and connections whose requests were never read
ONE = 'instance=~"$instance"'
MODEL = 'instance=~"$instance",model=~"$model"'
RATE = "$__rate_interval"

Panel = dict[str, Any]
Colours = dict[float | None, str]  # from a value on; None: from the least on
PLAIN: Colours = {None: "text"}


def query(expr: str, legend: str = "", kind: str = "time_series") -> Panel:
    return {
        "expr": expr,
        "legendFormat": legend,
        "format": kind,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
    }


def panel(
    kind: str,
    title: str,
    description: str,
    unit: str,
    *queries: Panel,
    thresholds: Colours = PLAIN,
    stack: bool = False,
    empty: str = "no traffic",
) -> Panel:
    """A panel; `empty` stands there without any series."""
    steps = [{"color": colour, "value": value} for value, colour in thresholds.items()]
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if stack:
        custom |= {"stacking": {"mode": "normal"}, "fillOpacity": 40}
    if kind == "timeseries" and len(steps) > 1:
        custom["thresholdsStyle"] = {"mode": "line"}
    defaults = {
        "unit": unit,
        "min": 0,
        "noValue": empty,
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": custom if kind == "timeseries" else {},
    }
    if kind == "stat":
        defaults["color"] = {"mode": "thresholds"}
        queries = tuple(each | {"instant": True, "range": False} for each in queries)  # now, or nothing
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "targets": [{**each, "refId": chr(65 + i)} for i, each in enumerate(queries)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {},
    }


graph = partial(panel, "timeseries")
stat = partial(panel, "stat")


def heat_map(title: str, description: str, unit: str, expr: str) -> Panel:
    made = panel("heatmap", title, description, unit, query(expr, "{{le}}", "heatmap"))
    made["options"] = {"calculate": False, "yAxis": {"unit": unit}, "color": {"scheme": "Blues", "mode": "scheme"}}
    return made


def quantiles(bucket: str, labels: str) -> list[Panel]:
    """p50, p95 and p99 of a histogram; nothing where nothing was counted, rather than NaN."""
    return [
        query(
            f"histogram_quantile({q}, sum by (le) (rate({bucket}_bucket{{{labels}}}[{RATE}]))) and on () "
            f"sum(rate({bucket}_count{{{labels}}}[{RATE}])) > 0",
            f"p{round(q * 100)}",
        )
        for q in (0.5, 0.95, 0.99)
    ]


def rows_of(panels: list[list[Panel]], heights: list[int]) -> list[Panel]:
    """Panels laid out row by row over the 24 columns."""
    placed, y = [], 0
    for row, height in zip(panels, heights, strict=True):
        width = 24 // len(row)
        for i, each in enumerate(row):
            placed.append({**each, "id": len(placed) + 1, "gridPos": {"x": i * width, "y": y, "w": width, "h": height}})
        y += height
    return placed


def row_for_each(variable: str) -> Panel:
    """A heading that is repeated, with the panels under it, for each value of a variable."""
    return {"type": "row", "title": f"${variable}", "repeat": variable, "collapsed": False, "panels": []}


def dashboard(uid: str, title: str, panels: list[Panel], **more: str) -> Panel:
    """A dashboard; `more`: variables beside instance and model, by the query that lists their values."""

    def variable(name: str, of: str) -> Panel:
        return {
            "name": name,
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": of, "refId": "A"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        }

    return {
        "uid": uid,
        "title": title,
        "tags": ["pose"],
        "schemaVersion": 41,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,
        "links": [
            {"type": "dashboards", "tags": ["pose"], "title": "Pose dashboards", "keepTime": True, "includeVars": True}
        ],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                variable("instance", 'label_values(up{job="pose"}, instance)'),
                variable("model", "label_values(pose_batch_crops_count, model)"),
                *(variable(name, of) for name, of in more.items()),
            ]
        },
        "panels": panels,
    }


ANSWERED = f"sum(rate(pose_people_per_image_sum{{{ONE}}}[{RATE}]))"
CROPS = f"sum(rate(pose_crops_total{{{MODEL}}}[{RATE}]))"
REQUESTS = f"sum(rate(pose_http_requests_total{{{WITH_REFUSED}}}[{RATE}]))"
FAULTS = f'(sum(rate(pose_http_requests_total{{{WITH_REFUSED},status=~"500|503"}}[{RATE}])) or vector(0)) / ({REQUESTS} > 0)'
WITHIN = (
    f'sum(rate(pose_http_request_duration_seconds_bucket{{{POSE},le="1.0"}}[{RATE}])) / '
    f"(sum(rate(pose_http_request_duration_seconds_count{{{POSE}}}[{RATE}])) > 0)"
)
P95 = quantiles("pose_http_request_duration_seconds", POSE)[1]["expr"]

SERVICE = [
    [
        stat(
            "People per second",
            "pose_people_per_image: those who are answered. Grey: nobody asks.",
            "short",
            query(ANSWERED),
        ),
        stat(
            "Faults (500, 503)",
            "pose_http_requests_total by status, refused connections too. Red: over the objective's 0.5 %; see Refused "
            "requests and the log lines of level error.",
            "percentunit",
            query(FAULTS),
            thresholds={None: "green", 0.005: "red"},
        ),
        stat(
            "p95 latency",
            "pose_http_request_duration_seconds. Red: over a second; see which stage grows.",
            "s",
            query(P95),
            thresholds={None: "green", 0.5: "yellow", 1: "red"},
        ),
        stat(
            "Within one second",
            "pose_http_request_duration_seconds. The objective is 95 %. Red: add replicas or cores.",
            "percentunit",
            query(WITHIN),
            thresholds={None: "red", 0.95: "green"},
        ),
        stat(
            "Replicas",
            "up. Red: none answers Prometheus.",
            "short",
            query(f'sum(up{{job="pose",{ONE}}}) or vector(0)'),
            thresholds={None: "red", 1: "green"},
            empty="no data",
        ),
        stat(
            "Room taken",
            "pose_admitted_crops against pose_queue_limit_crops. Red: over 60 % of the queue's room; clients are about to "
            "be refused: add replicas or cores. Pictures to search are refused sooner, at what runs in half their deadline.",
            "percentunit",
            query(f"sum(pose_admitted_crops{{{ONE}}}) / sum(pose_queue_limit_crops{{{ONE}}})"),
            thresholds={None: "green", 0.4: "yellow", 0.6: "red"},
            empty="no data",
        ),
    ],
    [
        graph(
            "Requests by status",
            "pose_http_requests_total, refused connections too. 4xx are the clients' faults, 500 and 503 the service's; 499: "
            "the client left; 504: a deadline passed. Refused requests has those that name no key or too large a body, too.",
            "reqps",
            query(f"sum by (status) (rate(pose_http_requests_total{{{WITH_REFUSED}}}[{RATE}]))", "{{status}}"),
            stack=True,
        ),
        graph(
            "Faults (500, 503)",
            "pose_http_requests_total. Over the line the month's budget burns: the log tells why.",
            "percentunit",
            query(FAULTS, "share of 500, 503"),
            thresholds={None: "green", 0.005: "red"},
        ),
        graph(
            "Latency",
            "pose_http_request_duration_seconds. Over the line: see which stage grows.",
            "s",
            *quantiles("pose_http_request_duration_seconds", POSE),
            thresholds={None: "green", 1: "red"},
        ),
    ],
    [
        graph(
            "Where the time goes",
            "pose_stage_duration_seconds, mean of an answered pose request (failed ones are not counted), stacked. queue: "
            "too few cores; decode: large photos; read: slow clients; infer: the network, on shared or throttled cores "
            "slower than at its quickest.",
            "s",
            query(
                f'sum by (stage) (rate(pose_stage_duration_seconds_sum{{{ONE},stage!="total"}}[{RATE}])) '
                f'/ on () group_left () (sum(rate(pose_stage_duration_seconds_count{{{ONE},stage="total"}}[{RATE}])) > 0)',
                "{{stage}}",
            ),
            stack=True,
        ),
        heat_map(
            "Latency of requests",
            "pose_http_request_duration_seconds. Two bands mean two kinds of requests (with and without boxes, "
            "one and many people).",
            "s",
            f"sum by (le) (increase(pose_http_request_duration_seconds_bucket{{{POSE}}}[{RATE}]))",
        ),
    ],
    [
        graph(
            "People per second, against the paper and the capacity",
            "pose_crops_total, pose_people_per_image, pose_crops_per_second_capacity (the lanes at their quickest). The "
            "paper's network did 17 persons a second on an i7-8700K. Run below it while crops wait: cores are shared or "
            "throttled. Answered far below run: clients leave, deadlines pass, or people are found twice.",
            "short",
            query(CROPS, "run"),
            query(ANSWERED, "answered"),
            query(f"sum by (model) (pose_crops_per_second_capacity{{{MODEL}}})", "capacity {{model}}"),
            query("vector(17)", "the paper"),
        ),
        graph(
            "Crops waiting",
            "pose_queue_crops, of pose_admitted_crops: the others' pictures are being decoded or searched, or they run. "
            "What waits longer than a deadline is dropped: add replicas or cores.",
            "short",
            query(f"sum by (instance) (pose_queue_crops{{{ONE}}})", "{{instance}}"),
            query(f"sum by (instance) (pose_admitted_crops{{{ONE}}})", "{{instance}} admitted"),
            empty="no data",
        ),
        graph(
            "Wait for a lane",
            "pose_queue_wait_seconds, also of a request's crops behind its own others. Over half a second: more comes than "
            "the cores can run, or one request has very many people.",
            "s",
            *quantiles("pose_queue_wait_seconds", ONE),
            thresholds={None: "green", 0.5: "red"},
        ),
    ],
    [
        graph(
            "Refused requests",
            "pose_rejected_total by problem code. queue_full: add replicas; deadline_exceeded: the "
            "deadline is shorter than the wait; invalid_*: the client's fault.",
            "reqps",
            query(f"sum by (code) (rate(pose_rejected_total{{{ONE}}}[{RATE}]))", "{{code}}"),
            stack=True,
        ),
        graph(
            "Dropped crops",
            "pose_dropped_crops_total. disconnect: clients left before their answer; deadline: it passed.",
            "cps",
            query(f"sum by (reason) (rate(pose_dropped_crops_total{{{ONE}}}[{RATE}]))", "{{reason}}"),
            stack=True,
        ),
        graph(
            "People in a picture",
            "pose_people_per_image, pose_images_total. Its change changes the work of a picture.",
            "short",
            query(
                f"sum(rate(pose_people_per_image_sum{{{ONE}}}[{RATE}])) "
                f"/ (sum(rate(pose_images_total{{{ONE}}}[{RATE}])) > 0)",
                "mean",
            ),
        ),
    ],
    [
        graph(
            "Frames of streams",
            "pose_stream_frames_total. skipped: a newer frame came before its turn, for clients that send too fast; "
            "refused: broken pictures; late: no room, or past the deadline; failed: the service's fault, see its log.",
            "cps",
            query(f"sum by (outcome) (rate(pose_stream_frames_total{{{ONE}}}[{RATE}]))", "{{outcome}}"),
            stack=True,
        ),
        graph(
            "Latency of frames",
            "pose_stream_frame_duration_seconds, from a frame's arrival to its answer. Once a second a frame is searched, "
            "and takes longer.",
            "s",
            *quantiles("pose_stream_frame_duration_seconds", ONE),
        ),
        graph(
            "Open streams",
            "pose_streams, up to POSE_MAX_STREAMS. Each asks for a frame at a time: the more, the fewer frames a second "
            "for each.",
            "short",
            query(f"sum by (instance) (pose_streams{{{ONE}}})", "{{instance}}"),
            empty="no data",
        ),
    ],
]

STAGES = [
    [row_for_each("stage")],
    [
        graph(
            "$stage: quantiles",
            "pose_stage_duration_seconds, of answered requests. What grows is where the time goes: queue: too few cores; "
            "decode: large photos; read: slow clients; infer and detect: cores that are shared or throttled.",
            "s",
            *quantiles("pose_stage_duration_seconds", f'{ONE},stage=~"$stage"'),
        ),
        heat_map(
            "$stage: how many took how long",
            "pose_stage_duration_seconds. Two bands mean two kinds of pictures; a band that climbs: all got slower.",
            "s",
            f'sum by (le) (increase(pose_stage_duration_seconds_bucket{{{ONE},stage=~"$stage"}}[{RATE}]))',
        ),
    ],
]

MACHINE = [
    [
        graph(
            "CPU",
            "process_cpu_seconds_total, cores used, against pose_lanes. At the line the replica is full.",
            "short",
            query(f'rate(process_cpu_seconds_total{{job="pose",{ONE}}}[{RATE}])', "{{instance}}"),
            query(f"pose_lanes{{{ONE}}}", "{{instance}} lanes"),
            empty="no data",
        ),
        graph(
            "Throttling",
            "pose_cpu_throttled_seconds_total, a lane of pose_lanes. Over a tenth where CPU is below its line: raise the "
            "quota to whole cores, or lower POSE_LANES. At the line whole cores are throttled too.",
            "percentunit",
            query(f"rate(pose_cpu_throttled_seconds_total{{{ONE}}}[{RATE}]) / pose_lanes", "{{instance}}"),
            thresholds={None: "green", 0.1: "red"},
            empty="no data",
        ),
        graph(
            "Memory",
            "process_resident_memory_bytes against pose_memory_limit_bytes, past which the replica is killed. It should stay "
            "flat under load; a steady climb is a defect.",
            "bytes",
            query(f'process_resident_memory_bytes{{job="pose",{ONE}}}', "{{instance}}"),
            query(f"pose_memory_limit_bytes{{{ONE}}}", "{{instance}} limit"),
            empty="no data",
        ),
    ],
    [
        graph(
            "Lanes at work",
            "pose_inference_seconds_total by network, against pose_lanes. At the line while crops wait: full.",
            "short",
            query(f"sum by (model) (rate(pose_inference_seconds_total{{{ONE}}}[{RATE}]))", "{{model}}"),
            query(f"sum(pose_lanes{{{ONE}}})", "lanes"),
            empty="no data",
        ),
        graph(
            "Lanes replaced",
            "pose_inference_workers_replaced_total. Any at all: the log tells which stood still or died.",
            "short",
            query(f"increase(pose_inference_workers_replaced_total{{{ONE}}}[{RATE}])", "{{instance}}"),
            thresholds={None: "green", 1: "red"},
            empty="no data",
        ),
        graph(
            "Open descriptors and connections",
            "process_open_fds, pose_http_connections, pose_http_requests_in_flight. "
            "Descriptors that climb without connections are a defect.",
            "short",
            query(f'process_open_fds{{job="pose",{ONE}}}', "{{instance}} descriptors"),
            query(f"pose_http_connections{{{ONE}}}", "{{instance}} connections"),
            query(f"pose_http_requests_in_flight{{{ONE}}}", "{{instance}} in flight"),
            empty="no data",
        ),
    ],
    [
        heat_map(
            "Batch sizes",
            "pose_batch_crops, of the detector too, always 1, unless a model is chosen. Batches grow with the queue, up to "
            "POSE_MAX_BATCH_CROPS.",
            "short",
            f"sum by (le) (increase(pose_batch_crops_bucket{{{MODEL}}}[{RATE}]))",
        ),
        graph(
            "Pictures searched",
            "pose_searched_images_total: pictures without boxes, which the detector searches.",
            "cps",
            query(f"sum by (model) (rate(pose_searched_images_total{{{ONE}}}[{RATE}]))", "{{model}}"),
        ),
        panel(
            "table",
            "Models",
            "pose_model_info: what each replica serves. Different sha256 of one version: a replica is out of date.",
            "none",
            query(f"pose_model_info{{{ONE}}}", "", "table") | {"instant": True},
            empty="no data",
        ),
    ],
]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for uid, title, rows, heights, more in (
        ("pose-service", "Pose service", SERVICE, [4, 8, 9, 8, 8, 8], {}),
        ("pose-stages", "Pose stages", STAGES, [1, 8], {"stage": "label_values(pose_stage_duration_seconds_count, stage)"}),
        ("pose-machine", "Pose machines", MACHINE, [8, 8, 8], {}),
    ):
        file = FOLDER / f"{uid.removeprefix('pose-')}.json"
        file.write_text(json.dumps(dashboard(uid, title, rows_of(rows, heights), **more), indent=1) + "\n")


if __name__ == "__main__":
    main()
