"""What the documents say is what there is: every setting, option, problem and metric, and the limits."""

import re
from pathlib import Path

import pytest

from app import cli, client
from app.api.bodies import PICTURE_TYPES
from app.api.problems import PROBLEMS
from app.api.schemas import Options
from app.settings import Settings
from app.telemetry.metrics import Metrics

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "app/README.md").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()
FOLDERS = ("app", "docker", "loadtests", "model_store", "tests", "training")
PAGES = sorted(ROOT.glob("*.md")) + sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))
UNITS = {"": 1, "a picture": 1, "s": 1, "million": 10**6, "MiB": 2**20}


def default_of(setting: str) -> str:
    """The default as the reference writes it."""
    value = Settings.model_fields[setting].default
    if value in ((), ""):
        return "none"
    return f"`{value.name}/`" if isinstance(value, Path) else f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("setting", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(setting):
    rows = [row for row in REFERENCE.splitlines() if row.startswith("| `POSE_") and f"`POSE_{setting.upper()}`" in row]
    assert len(rows) == 1, f"POSE_{setting.upper()} has no row of its own in app/README.md"
    names, defaults = rows[0].split("|")[1:3]
    place = re.findall(r"`POSE_(\w+)`", names).index(setting.upper())
    assert defaults.strip().split(", ")[place] == default_of(setting)


def test_no_setting_is_documented_that_there_is_not():
    assert {name.lower() for name in re.findall(r"`POSE_([A-Z_]+)`", REFERENCE)} <= Settings.model_fields.keys()


def test_the_limits_of_security_are_the_defaults():
    rows = re.findall(r"^\| (`POSE_[^|]+) \| ([^|]+) \|", SECURITY, re.MULTILINE)
    assert rows
    for names, defaults in rows:
        for name, default in zip(re.findall(r"`POSE_(\w+)`", names), defaults.split(", "), strict=True):
            number, _, unit = default.partition(" ")
            told = float(number) * UNITS[unit] * (1000 if name.endswith("_MS") else 1)  # times are told in seconds
            assert told == Settings.model_fields[name.lower()].default, name


@pytest.mark.parametrize("option", ["boxes", *Options.model_fields])
def test_every_option_is_documented(option):
    assert re.search(rf"^\| `{option}` \|", REFERENCE, re.MULTILINE)


def test_the_client_takes_every_option():
    assert client.Options.__annotations__.keys() == Options.model_fields.keys() - {"format"}


@pytest.mark.parametrize("command", [cli.predict, cli.track])
def test_the_command_line_takes_every_option(command):
    assert Options.model_fields.keys() - {"format", "timeout_ms"} <= {option.name for option in command.params}


@pytest.mark.parametrize("kind", PICTURE_TYPES)
def test_every_content_type_of_a_picture_is_documented(kind):
    assert f"`{kind}`" in REFERENCE
    if kind.startswith("image/"):
        assert kind in (ROOT / "app/api/static/demo.html").read_text()


@pytest.mark.parametrize("code", PROBLEMS)
def test_every_problem_is_documented_with_its_status(code):
    (row,) = [row for row in REFERENCE.splitlines() if row.startswith("| ") and f"`{code}`" in row]
    assert str(PROBLEMS[code][0]) in row.split("|")[1]


def test_every_metric_is_documented():
    metrics = {
        (family.name, ",".join(getattr(metric, "_labelnames", ())))
        for metric in vars(Metrics()).values()
        if hasattr(metric, "describe")
        for family in metric.describe()
    }
    documented = set(re.findall(r"`(pose_\w+?)(?:_total)?(?:\{([^`]*)\})?`", REFERENCE))
    assert {metric for metric in metrics if metric[0].startswith("pose_")} == documented


def slugs_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_the_pages_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs_of(target), link
