"""Log lines: one JSON object each, whatever is logged."""

import json
import logging
import os
import pty
import subprocess
import sys

from app.telemetry.logs import JsonLines


def line(message: object, *args: object, **fields: object) -> dict:
    record = logging.getLogger("a.logger").makeRecord("a.logger", logging.WARNING, "f", 1, message, args, None, extra=fields)
    text = JsonLines().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_has_time_level_logger_and_message():
    told = line("%s of %d", "one", 2)
    assert told.keys() == {"time", "level", "logger", "message"}
    assert (told["level"], told["logger"], told["message"]) == ("warning", "a.logger", "one of 2")
    assert told["time"].endswith("+00:00")


def test_extra_fields_become_fields_of_the_line():
    told = line("x", status=200, request_id="a", text="two\nlines", odd=object)
    assert (told["status"], told["request_id"], told["text"]) == (200, "a", "two\nlines")
    assert "object" in told["odd"]


def test_an_exception_is_one_field():
    error = ValueError("two\nlines")
    record = logging.getLogger("a").makeRecord("a", logging.ERROR, "f", 1, "failed", (), (ValueError, error, None))
    text = JsonLines().format(record)
    assert "\n" not in text
    assert "ValueError: two\nlines" in json.loads(text)["exception"]


def messages(script: str) -> list[str]:
    """What the lines on standard error of a script say that has logging and logs at hand."""
    script = f"import logging; from app.telemetry import logs; {script}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [json.loads(line)["message"] for line in ended.stderr.splitlines()]


def test_every_logger_writes_json_lines_of_the_level_asked_for():
    assert messages(
        "logs.configure('WARNING'); logging.getLogger('x').info('no'); logging.getLogger('x').warning('yes');"
        "logging.getLogger('uvicorn.error').warning('no'); logging.getLogger('uvicorn.error').error('too')"
    ) == ["yes", "too"]


def test_single_loggers_may_have_levels_of_their_own():
    assert messages(
        "logs.configure('INFO,app.requests=ERROR,x.y=DEBUG');"
        "logging.getLogger('app.requests').warning('no'); logging.getLogger('app').info('one');"
        "logging.getLogger('x.y').debug('two'); logging.getLogger('x').debug('no')"
    ) == ["one", "two"]


def test_where_nobody_reads_them_lines_are_lost_and_nobody_waits():
    script = (
        "import logging; from app.telemetry import logs; logs.configure('INFO'); log = logging.getLogger('x');"
        "[log.info('%d' + 'x' * 100, i) for i in range(5000)]; print('not stuck', flush=True); input();"
        "import time;"
        "[time.sleep(0.1) or log.info('later') for _ in range(20)]"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        assert process.stdout.readline() == "not stuck\n"
        lines = [json.loads(line) for line in process.communicate("\n", timeout=60)[1].splitlines()]
    lost = [line["lost"] for line in lines if line["level"] == "warning"]
    written = [line["message"].rstrip("x") for line in lines if line["level"] == "info"]
    numbers = [int(message) for message in written if message != "later"]
    assert numbers == list(range(len(numbers)))
    assert sum(lost) > 1000
    assert len(written) + sum(lost) == 5020
    assert written[-1] == "later"


def test_nor_does_anybody_wait_for_a_terminal_that_is_not_read():
    script = (
        "import logging; from app.telemetry import logs; logs.configure('INFO');"
        "[logging.getLogger('x').info('x' * (100 + 7 * i % 400)) for i in range(5000)]"
    )
    terminal, shown = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stderr=shown) as process:
        assert process.wait(60) == 0
    os.close(shown)
    assert json.loads(os.read(terminal, 60_000).partition(b"\n")[0])["level"] == "info"
    os.close(terminal)


def test_a_process_ends_whose_lines_nobody_reads():
    script = (
        "import logging; from app.telemetry import logs; logs.configure('INFO');"
        "[logging.getLogger('x').info('x' * 100) for i in range(5000)]"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 0
