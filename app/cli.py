"""`lpn …` (scripts/lpn): the service on the command line."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app import __main__ as service  # first, since it sets what libraries read when they are imported
from app import __version__

if TYPE_CHECKING:
    from app.client import AsyncPoseClient
    from app.settings import Settings

_SHARE = click.FloatRange(0, 1)
_DAY_MS = 24 * 3600 * 1000
_LATER = 75  # exit code: what failed may do the next time (EX_TEMPFAIL of sysexits.h)
_PATIENT_RETRIES = 240  # about five minutes where the service names no longer wait


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lpn")
def main() -> None:
    """COCO keypoints of the people in photos and videos, on CPUs.

    Settings are POSE_... in the environment, as for the service (app/README.md).
    """


@main.command()
def serve() -> None:
    """Run the service until it is stopped, as scripts/serve does."""
    sys.exit(service.serve())


def _of_a_service(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option(
        "--key", envvar="LPN_KEY", help="API key of that service, if it needs one; also read from LPN_KEY."
    )(command)
    return click.option(
        "--server", metavar="URL", help="Address of a running service. Without it this command does the work itself."
    )(command)


def _options_of_people(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--model", help="Pose model, name or name/version; `scripts/lpn models` lists them."),
            click.option("--flip-test", is_flag=True, help="Average with the mirrored crop: slower, a little better."),
            click.option("--keypoint-threshold", type=_SHARE, help="Score from which a joint is called visible, and drawn."),
            click.option("--detection-threshold", type=_SHARE, help="Least score of a found person."),
            click.option("--max-people", type=click.IntRange(1), help="The most people to find in a picture. Default: 50."),
        )
    ):
        command = option(command)
    return command


@main.command(
    epilog="\b\nExamples:\n"
    "  scripts/lpn predict party.jpg\n"
    "  scripts/lpn predict photos/ --out people.json --draw drawn/\n"
    "  scripts/lpn predict photos/ --boxes boxes.json --format results --out results.json\n"
    "  scripts/lpn predict photos/ --server http://localhost:8000 --out people.json"
)
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--boxes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="COCO data set whose boxes are the people, and whose ids the photos keep; without it people are found.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the answer; without it, standard output. A run that was interrupted goes on when it is started again.",
)
@click.option(
    "--format", "form", type=click.Choice(["coco", "results"]), default="coco", help="A COCO data set, or COCO results."
)
@click.option(
    "--draw", type=click.Path(file_okay=False, path_type=Path), help="Folder for the photos with skeletons on them."
)
@_options_of_people
@_of_a_service
def predict(
    photos: tuple[Path, ...],
    boxes: Path | None,
    out: Path | None,
    form: str,
    draw: Path | None,
    server: str | None,
    key: str | None,
    **options: Any,
) -> None:
    """Find the people of PHOTOS, files or folders, and write one COCO file of them all.

    A photo's file_name in the answer is its path within the named folder, or its bare name. In folders, files that end
    in .jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .tif or .tiff are photos. Photos that cannot be read, among them those
    in .heic, .heif, .avif and .gif, are left out and listed at the end; the exit code is then 1. It is 75 where another
    start may do better: a file could not be read, as on a disk that was away, or the service gave no answer, came too late or
    failed. With --out, the same command then asks for what is missing alone; --out FILE is written all the same where only
    some photos failed, and FILE.part keeps the answers until then. Without --boxes, photos
    are numbered from 0 in the order of the arguments, those of a folder by path.
    COCO results hold these numbers and no names of files: where you need names, take --format coco.
    """
    settings = _settings()
    from app import photos as many

    chosen = many.photos_of(photos, boxes)
    task = many.Task(
        photos=chosen,
        options=_given(options),
        run={"server": server, "boxes": many.sha256_of(boxes)},
        out=out,
        form=form,
        draw=draw,
        max_bytes=settings.max_body_bytes,
        max_pixels=settings.max_image_pixels,
    )
    many.check_outputs(task, [*photos, *([] if boxes is None else [boxes])])

    async def run() -> int:
        async with _client(server, key, settings) as client:
            with click.progressbar(length=len(chosen), **_bar("photos")) as bar:
                asked = await many.asked_of(task, client)
                failed = await many.predict(asked, client, 16 if server else _at_once(), bar.update)
        if failed:
            click.echo("\n".join([f"{len(failed)} of {len(chosen)} photos failed:", *map(str, failed)]), err=True)
        return _LATER if any(fault.passing for fault in failed) else bool(failed)

    sys.exit(_told(run))


@main.command(
    epilog="\b\nExamples:\n"
    "  scripts/lpn track dance.mp4 --draw drawn.mp4\n"
    "  scripts/lpn track dance.mp4 --out people.jsonl --max-people 2"
)
@click.argument("video", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the messages. Without --out and --draw they go to standard output.",
)
@click.option(
    "--draw",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the video with skeletons and numbers on it, .mp4.",
)
@_options_of_people
def track(video: Path, out: Path | None, draw: Path | None, **options: Any) -> None:
    """Follow the people of VIDEO: one line of JSON a frame, in which each person keeps a number.

    The lines are the messages of the service's streams (app/README.md, "Streams"); joints are smoothed.
    """
    settings = _settings()
    from app import video as one

    one.check_outputs(video, out, draw)

    async def run() -> int:
        with one.frames_of(video) as frames:
            told = frames.count > 0 and not (out is None and draw is None and sys.stdout.isatty())
            with click.progressbar(length=frames.count, **_bar("frames", told)) as bar:
                await one.track(frames, out, draw, _patient(settings), _given(options), bar.update)
            return one.told_missing(frames)

    sys.exit(_told(run))


@main.command()
@_of_a_service
def models(server: str | None, key: str | None) -> None:
    """List the models; those of this machine's store are verified by their sha256."""
    settings = _settings()

    async def run() -> int:
        async with _client(server, key, settings, works=False) as client:
            for model in await client.models():
                size = f"{model['input_width']} wide, {model['input_height']} high"
                default = f", the default {model['kind']}" if model["default"] else ""
                click.echo(f"{model['name']}/{model['version']}: {model['network']}, {model['precision']}, {size}{default}")
                click.echo(f"    sha256 {model['sha256']}")
                for name, measured in model["accuracy"].items():
                    boxes = " from labelled boxes" if model["kind"] == "pose" else ""
                    click.echo(f"    {name}: AP {measured['ap']:.4f}{boxes}" if "ap" in measured else f"    {name}")
        return 0

    sys.exit(_told(run))


def _given(options: dict[str, Any]) -> Any:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def _bar(label: str, told: bool = True) -> dict[str, Any]:
    """A progress bar on standard error, where somebody sees it and it is to be told."""
    return {"label": label, "show_pos": True, "file": sys.stderr, "hidden": not (told and sys.stderr.isatty())}


def _settings() -> "Settings":
    settings = service.read_settings()
    if settings is None:
        sys.exit(1)
    return settings


def _patient(settings: "Settings") -> "Settings":
    """Those of a service of one's own: nobody waits for a single photo, and what comes at once is bounded here."""
    endless = {"timeout_ms": _DAY_MS, "max_timeout_ms": _DAY_MS, "queue_crops": 2**30, "queue_bytes": 2**40}
    return settings.model_copy(update={"api_keys": (), **endless})


def _at_once() -> int:
    """Photos that a service of one's own is given at once: while some are decoded, others keep its lanes busy."""
    from app.inference.session import usable_cores

    return 2 * usable_cores()


@asynccontextmanager
async def _client(
    server: str | None, key: str | None, settings: "Settings", works: bool = True
) -> "AsyncIterator[AsyncPoseClient]":
    """A client of the service at that address, or of one within this process; `works`: it is asked for people."""
    import httpx

    from app.api.application import create_app
    from app.client import AsyncPoseClient

    if server is not None:
        async with AsyncPoseClient(server, key=key) as hasty:
            await hasty.models()  # a wrong address is told at once …
        async with AsyncPoseClient(server, key=key, retries=_PATIENT_RETRIES) as client:
            yield client  # … and a service that starts again in the middle is waited for
        return
    app = create_app(_patient(settings))
    if works:
        await app.state.pipeline.start()
    try:
        # Shielded, or who is cancelled would be answered that the service shuts down, and asked again.
        transport = httpx.ASGITransport(lambda *asgi: asyncio.shield(app(*asgi)))
        async with AsyncPoseClient(transport=transport, at_once=_at_once()) as client:
            yield client
    finally:
        await app.state.pipeline.stop()


def _told(run: "Callable[[], Any]") -> int:
    """What `run` returns; what stops it is told in one line."""
    from app.client import PoseError
    from app.inference.model_store import ModelError

    if sys.stdout is None or sys.stderr is None:  # what is printed would land in the next file that is opened
        raise click.ClickException("Standard output and standard error must not be closed.")

    stopped = signal.SIGINT

    async def stoppable() -> int:
        running = asyncio.ensure_future(run())

        def stop(by: signal.Signals) -> None:
            nonlocal stopped
            stopped = by
            running.cancel()

        for by in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, or half-written files would stay
            if signal.getsignal(by) == signal.SIG_DFL:  # it is another under nohup
                asyncio.get_running_loop().add_signal_handler(by, stop, by)
        return int(await running)

    try:
        code = asyncio.run(stoppable())
    except (asyncio.CancelledError, KeyboardInterrupt):
        click.echo("Aborted!", err=True)
        return 128 + stopped  # as shells have it: 1 would be that of a run that is done
    except (PoseError, ModelError, ValueError) as error:
        raise _plain(error) from error
    sys.stdout.flush()
    return code


class _Later(click.ClickException):
    exit_code = _LATER


def _plain(error: Exception) -> click.ClickException:
    """The one line, and whether a later start may fare better: nobody was reached, or had time."""
    import httpx

    from app.client import NoAnswer, Refused

    told = str(error).removeprefix("query.")
    if isinstance(error, Refused) and error.code == "unauthorized":
        told = "The service wants a key, and none or a wrong one was given: --key or LPN_KEY."
    unreached = isinstance(error, NoAnswer) and isinstance(error.__cause__, httpx.TransportError)
    busy = isinstance(error, Refused) and error.status in (429, 502, 503, 504)
    return _Later(told) if unreached or busy else click.ClickException(told)


def _run() -> None:
    """`main`; a file that cannot be read or written, standard output too, is told in one line."""
    try:
        main(prog_name="scripts/lpn")
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {named}{error.strerror or error}", err=True)
        os._exit(1)  # sys.exit would try again to write what standard output holds


if __name__ == "__main__":
    _run()
