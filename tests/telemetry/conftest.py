"""A real mesh that is traced and asked what it measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from local.layout import Layout
from local.mesh import Mesh, in_background
from tests.canaries import WATCH
from tests.e2e.conftest import user
from tests.mesh import COMMANDS, channel, http, trust
from tests.telemetry.receiver import Receiver, receiving

__all__ = ["channel", "http", "trust", "user"]


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """Where the mesh sends its traces."""
    with receiving() as receiver:
        yield receiver
    WATCH.look_at_spans(receiver)


@pytest.fixture(scope="session")
def mesh(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh of its own: every call of it is traced."""
    mesh = Mesh(
        Layout(tmp_path_factory.mktemp("traced")), workers=1, durable=False, commands=COMMANDS
    )
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("KIMBERLY_OTLP_ENDPOINT", receiver.endpoint)
            environment.setenv("KIMBERLY_TRACE_RATIO", "1")
            stack.enter_context(in_background(mesh))
        yield mesh
        WATCH.look_at_metrics(mesh)
