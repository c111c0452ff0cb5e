"""The real service on a free port, as a user starts it, and the photos that the tests send."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
PHOTOS = Path(__file__).parent / "data/photos"

T_POSE_BOX = (295, 15, 545, 595)
TWO_WOMEN_BOXES = ((140, 200, 225, 640), (620, 20, 655, 825))

os.environ["no_proxy"] = "127.0.0.1,::1,localhost"  # what is asked here is on this machine, whatever proxy its user has
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background jobs have it so, and what they start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True, slots=True)
class Service:
    """A running service: its process, its address and a client for it; `log` is what it wrote to standard error."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    port: int
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample, 0 where there is none; labels may be given in part, and are summed over then."""
        total = 0.0
        text = self.client.get("/metrics").text
        family = re.sub(r"_(total|bucket|sum|count)$", "", name)
        assert re.search(rf"^# TYPE {family}(_total)? ", text, re.MULTILINE), f"there is no metric {name}"
        for line in text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                present = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= present.items():
                    total += float(found[3])
        return total

    def forget_peak_memory(self) -> None:
        """Let `peak_memory` count from now on."""
        refs = Path(f"/proc/{self.process.pid}/clear_refs")
        if not refs.exists():
            pytest.skip("peaks of memory are read from /proc")
        refs.write_text("5")

    @property
    def peak_memory(self) -> int:
        """Bytes that the service has held at most."""
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())[1])

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Look again and again until the condition holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"not within {seconds} s; the service's log:\n{self.log}"
            time.sleep(0.02)


StartService = Callable[..., Service]


def _environment(**settings: object) -> dict[str, str]:
    """This process's environment with the service's settings replaced by the given ones.

    glibc gives large blocks back at once and keeps none for later, so that tests of memory see what the service holds.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POSE_")}
    asked = {f"POSE_{name.upper()}": str(value) for name, value in settings.items()}
    return kept | {"POSE_PORT": "0", "MALLOC_MMAP_THRESHOLD_": str(2**17)} | asked


def _start(log_file: Path, wait: bool = True, **settings: object) -> Service:
    with log_file.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "app"], cwd=ROOT, env=_environment(**settings), stderr=log)
    try:
        service = _listening(process, log_file)
        if wait:
            service.wait_until(lambda: _ready(service), 180)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return service


def _listening(process: subprocess.Popen[bytes], log_file: Path) -> Service:
    until = time.monotonic() + 180
    while not (found := re.search(r"listens on (http://\S+:(\d+))\n", log_file.read_text())):
        assert process.poll() is None, f"the service ended with {process.returncode}:\n{log_file.read_text()}"
        assert time.monotonic() < until, "the service did not start within three minutes"
        time.sleep(0.02)
    return Service(process, httpx.Client(base_url=found[1], timeout=60), int(found[2]), log_file)


def _ready(service: Service) -> bool:
    try:
        return service.client.get("/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def _stop(service: Service) -> None:
    """Stop a service, which must end by itself and with 0."""
    service.client.close()
    service.process.terminate()
    try:
        code = service.process.wait(120)
    except subprocess.TimeoutExpired:
        service.process.kill()
        code = service.process.wait()
    assert code == 0, f"the service ended with {code}:\n{service.log}"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with default settings and the real model store, shared by all tests."""
    running = _start(tmp_path_factory.mktemp("service") / "log")
    yield running
    _stop(running)


@pytest.fixture(scope="session")
def client(service: Service) -> httpx.Client:
    """A client of the shared service."""
    return service.client


@pytest.fixture(scope="module")
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Start further services with settings of their own, start_service(queue_crops=3), until the module's tests end.

    With wait=False they are given back before they are ready.
    """
    folder = tmp_path_factory.mktemp("services")
    running: list[Service] = []

    def start(wait: bool = True, **settings: object) -> Service:
        running.append(_start(folder / f"log-{len(running)}", wait, **settings))
        return running[-1]

    yield start
    with contextlib.ExitStack() as stops:  # every one, whatever becomes of the others
        for service in running:
            stops.callback(_stop, service)


@pytest.fixture(scope="session")
def t_pose() -> bytes:
    """A photo of one person, who stands in T_POSE_BOX, 1080 × 720."""
    return (PHOTOS / "t_pose_cc0.jpg").read_bytes()


@pytest.fixture(scope="session")
def two_women() -> bytes:
    """A photo of two people, who stand in TWO_WOMEN_BOXES, 1280 × 845."""
    return (PHOTOS / "two_women_outdoors_cc0.jpg").read_bytes()
