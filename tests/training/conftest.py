"""What every test of the training needs."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A training takes SIGTERM and Ctrl-C; pytest gets them back."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)
