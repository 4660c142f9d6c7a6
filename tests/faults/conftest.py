"""A real mesh that the tests may hurt, and the figures that they print at the end."""

import os
import random
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest
import pytest_asyncio
from rich.console import Console

from local.fleet import Commands
from local.layout import Layout
from local.mesh import Mesh, in_background
from tests.crashes.conftest import reader
from tests.faults.figures import Figures
from tests.faults.meditations import SIZE, Library, Scores
from tests.faults.reach import signed_up

__all__ = ["reader"]

LEASE_SECONDS = 5
"""Shorter than usual: a test that waits for a lease to lapse waits so long."""
COMMANDS = Commands(
    service=("env", f"KIMBERLY_LEASE_SECONDS={LEASE_SECONDS}", sys.executable, "-m", "server"),
    worker=(sys.executable, "-m", "tests.faults.small_batches"),
)
_FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(1_000_000)))
    config.stash[_FIGURES] = Figures(seed)


def pytest_terminal_summary(config: pytest.Config) -> None:
    figures = config.stash[_FIGURES]
    if figures.faults or figures.guards:
        figures.show(Console(file=sys.stdout, width=100))


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    return pytestconfig.stash[_FIGURES]


@contextmanager
def running_mesh(session: pytest.Session) -> Iterator[Mesh]:
    """Run a durable mesh with two workers. Its state is kept when a test failed."""
    state = Path(mkdtemp(prefix="kimberly-faults-"))
    state.chmod(0o755)
    with in_background(Mesh(Layout(state), workers=2, durable=True, commands=COMMANDS)) as running:
        yield running
    if session.testsfailed:
        sys.stderr.write(f"\nthe state and the logs of the mesh are in {state}\n")
    else:
        shutil.rmtree(state)


@pytest.fixture(scope="session")
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """The mesh that most tests hurt."""
    with running_mesh(request.session) as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def library(mesh: Mesh) -> AsyncIterator[Library]:
    """Memories to meditate over."""
    async with signed_up(mesh, "reader") as user:
        library = Library(mesh, user)
        await library.fill()
        yield library


@pytest_asyncio.fixture(scope="session")
async def undisturbed(library: Library) -> Scores:
    """The scores of a run that nothing interrupted."""
    run = await library.meditate()
    assert (await library.ends(run, 90)).scored == SIZE
    assert set(await library.times_scored()) == {1}
    return await library.scores()
