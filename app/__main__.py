"""`python -m app`: read the settings, load the models, serve."""

import os
import resource
import signal
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.settings import Settings

# One thread rule: BLAS opens its pool, and OpenCV reads its limit, when numpy and cv2 are imported, so before them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

_OTHER_FILES = 200  # that may be open beside connections: libraries, models while they are read, probes' connections


def read_settings() -> "Settings | None":
    """The settings of the environment; None, once it is told which of them are wrong. To be called before cv2 is imported."""
    from pydantic import ValidationError

    from app.settings import Settings, strange_settings

    strange = strange_settings(os.environ)
    of_kubernetes = any(name.endswith("_SERVICE_HOST") for name in strange)
    why = " (of a Service in Kubernetes? Set enableServiceLinks: false in the pod's spec)" if of_kubernetes else ""
    for name in strange:
        print(f"{name}: there is no such setting{why}", file=sys.stderr)
    if strange:
        return None
    try:
        settings = Settings()
    except ValidationError as error:
        for fault in error.errors():
            name = "POSE_" + "_".join(str(part) for part in fault["loc"]).upper()
            print(f"{name}: {fault['msg'].removeprefix('Value error, ')} (it is {fault['input']!r})", file=sys.stderr)
        return None
    # A model's golden.png is read under it as well, with sides of 2048 at most.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(max(settings.max_image_pixels, 2048 * 2048)))
    return settings


def _raise_file_limit(connections: int) -> str | None:
    """Raise the limit of open files to what so many connections need; the fault, where the system does not let us.

    At that limit it hands over no more connections, those of probes too, and tells nobody.
    """
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, OverflowError, ValueError):
        return f"{connections} connections need {needed} open files, and the system gives this process fewer (ulimit -Hn)"
    return None


def serve() -> int:
    """Serve until a signal; 0 after a clean stop, 1 with one clear line where the service cannot start."""
    # Until the server takes them: as the first process of a container it would not be stopped by them otherwise.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    settings = read_settings()
    if settings is None:
        return 1
    # A crash would write the pictures in memory to a disk. Linux hands them to a program whatever the limit is, but for 1.
    core = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    if fault := _raise_file_limit(settings.max_connections):
        print(f"POSE_MAX_CONNECTIONS: {fault}", file=sys.stderr)
        return 1

    import uvicorn

    from app.api.application import create_app
    from app.api.connections import Connection
    from app.api.server import Server
    from app.api.stream_connection import StreamConnection
    from app.inference.model_store import ModelError
    from app.telemetry import logs

    logs.configure(settings.log_level)
    try:
        app = create_app(settings)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    config = uvicorn.Config(
        app,
        http=partial(Connection, settings, app.state.metrics),  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=620,  # Google's proxies drop an idle one after 600 s, most far sooner: never under a request
        timeout_graceful_shutdown=settings.drain_s,
        ws=partial(StreamConnection, settings, app.state.metrics),  # type: ignore[arg-type]
        ws_max_size=settings.max_frame_bytes,
        ws_per_message_deflate=False,  # pictures are compressed, and a bomb costs its sender nothing
        ws_ping_interval=None,  # a stream without frames is closed anyhow
    )
    try:
        sock = socket.create_server(
            (settings.host, settings.port),
            family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
            dualstack_ipv6=settings.host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # the rest would tell the address again
        print(f"POSE_HOST, POSE_PORT: cannot listen on {settings.host}:{settings.port} ({reason})", file=sys.stderr)
        return 1
    # Now, not when it runs: a signal in between would be lost. After a clean stop uvicorn raises the signal once more.
    server = Server(config, app.state.pipeline)
    signal.signal(signal.SIGTERM, server.handle_exit)
    signal.signal(signal.SIGINT, server.handle_exit)
    host, port = sock.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"The LPN pose service listens on http://{address}:{port}", file=sys.stderr, flush=True)
    server.run(sockets=[sock])
    os._exit(0)  # a thread that stands still in a network would keep the process for ever


def main() -> int:
    """`serve`, which takes no arguments."""
    if sys.argv[1:]:
        told = "this command takes no arguments; settings are POSE_… in the environment (app/README.md)"
        print(f"{sys.argv[1]}: {told}", file=sys.stderr)
        return 1
    return serve()


if __name__ == "__main__":
    sys.exit(main())
