"""`python -m local`: start, stop and look at the mesh on this machine."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from local import demo, rotation
from local.layout import CHECKOUT, Layout
from local.lock import AlreadyRunningError, Identity, holder_of
from local.mesh import Mesh
from local.processes import Process, ProcessFailedError, State, tail
from local.prometheus import find_prometheus
from local.table import figure_table, table_now
from server.access import EDGE

REFRESHES_PER_SECOND = 4
DETACH_SECONDS = 660.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05

app = typer.Typer(
    help=(
        "Run Kimberly's memory mesh on this machine: PostgreSQL, Valkey, an S3 server, the "
        "services, workers, their Envoy sidecars and the edge.\n\n"
        "Everything listens on the loopback interface only. All state is in one directory, .mesh "
        "in the checkout; the environment variable KIMBERLY_STATE names another one."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# Into a file or a pipe nothing is cut off.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)

Workers = Annotated[int, typer.Option(min=0, max=32, help="How many workers to run.")]
Detach = Annotated[
    bool,
    typer.Option("--detach", help="Return when everything is ready; the mesh keeps running."),
]


@app.command()
def up(workers: Workers = 2, detach: Detach = False) -> None:  # noqa: FBT002 - a flag of the CLI
    """Start the mesh, show what runs, and keep it running.

    The first start makes databases, keys and certificates; later ones find what was stored. A
    process that dies is started again. Ctrl-C stops everything in order, a second one at once.

    It shows a live table until Ctrl-C; with --detach it runs in the background until `make down`.
    More workers finish the nightly meditation sooner. A Prometheus, where the machine has one,
    remembers what the mesh measures; `status` asks it.
    """
    layout = Layout.default()
    if detach:
        _detach(layout, workers)
        return
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(run(Mesh(layout, workers=workers, prometheus=find_prometheus())))
    except (AlreadyRunningError, ProcessFailedError, OSError) as error:
        _fail(str(error))


@app.command()
def down() -> None:
    """Stop the mesh that runs in the state directory, wherever it was started.

    Calls under way get a moment to end. When it returns, no process is left. Stored data stays.
    """
    layout = Layout.default()
    holder = holder_of(layout.state)
    if holder is None:
        console.print(f"No mesh runs in {layout.state}.")
        return
    holder.send(signal.SIGTERM)
    if not holder.wait_gone(STOP_SECONDS):
        _fail(f"The mesh (pid {holder.pid}) still stops after {STOP_SECONDS:.0f} s.")
    console.print(f"The mesh in {layout.state} is stopped.")


@app.command()
def status() -> None:
    """Show the processes of the running mesh, what they measure, and how to reach it.

    The exit code is 0 if everything is ready and 1 if not, or if no mesh runs.
    """
    layout = Layout.default()
    mesh = _running(layout)
    if mesh is None:
        _fail(f"No mesh runs in {layout.state}. `python -m local up` starts one.")
    console.print(table_now(mesh))
    console.print()
    console.print(figure_table(mesh, now=time.time()))
    console.print()
    console.print(_how_to_reach(mesh))
    raise typer.Exit(0 if mesh["ready"] else 1)


@app.command("rotate-certificates")
def rotate_certificates() -> None:
    """Issue every certificate of the mesh anew, under traffic.

    Returns when every Envoy that runs shows its own. No connection is cut: what is open goes on.
    """
    layout = Layout.default()
    rotation.rotate_leaves(layout)
    _tell_shown(layout)


@app.command("rotate-authority")
def rotate_authority(
    step: Annotated[rotation.Step, typer.Argument(help="Take the steps in this order.")],
) -> None:
    """Let another authority take over, under traffic, in three steps.

    publish: it is trusted beside the one that signs. Clients of the edge read the file that they
    trust anew. sign: it signs. withdraw: the one before is trusted no more; whoever has a
    certificate of it is out when their connection is 15 minutes old at the latest.
    """
    layout = Layout.default()
    try:
        rotation.rotate_authority(layout, step)
    except FileNotFoundError:
        _fail("No authority is published that could sign: publish comes first.")
    _tell_shown(layout)


def _tell_shown(layout: Layout) -> None:
    mesh = _running(layout)
    if mesh is None:
        console.print("No mesh runs; the next one starts with the new certificates.")
        return
    envoys = [
        name.removesuffix("-sidecar")
        for name in mesh["processes"]
        if name.partition("-")[0] == EDGE or name.endswith("-sidecar")
    ]
    try:
        asyncio.run(rotation.wait_shown(layout, envoys))
    except TimeoutError:
        _fail(f"Not every Envoy shows its new certificate; their logs are in {layout.logs}")
    console.print(f"{len(envoys)} Envoys show new certificates.")


@app.command("demo")
def demo_command(
    file: Annotated[
        Path, typer.Argument(help="JSON Lines of speaker, text and time; a sample if not given.")
    ] = demo.SAMPLE,
    workers: Workers = 2,
) -> None:
    """Do the main job on a conversation and report.

    Signs up, imports the conversation, meditates, asks three questions, verifies the audit log.
    It uses the mesh that runs; if none does, it starts one and stops it again.
    """
    layout = Layout.default()
    try:
        turns = demo.read_transcript(file)
        asyncio.run(_demo(layout, file, turns, workers))
    except (demo.DemoError, AlreadyRunningError, ProcessFailedError, OSError) as error:
        _fail(str(error))


# --- demo --------------------------------------------------------------------------------------


async def _demo(layout: Layout, file: Path, turns: list[demo.Turn], workers: int) -> None:
    report = demo.Report()
    async with contextlib.AsyncExitStack() as stack:
        with report.step("mesh ready") as tell:
            mesh = _running(layout)
            tell("it was running" if mesh else "started; it stops after the demo")
            if mesh is None:
                with console.status("starting the mesh …"):
                    started = await stack.enter_async_context(Mesh(layout, workers=workers))
                    await started.wait_ready()
                mesh = started.describe()
        questions = demo.questions_about(file, turns)
        address = f"{mesh['host']}:{mesh['port']}"
        await demo.run(address, Path(mesh["ca"]), turns, questions, report, console)


# --- up ----------------------------------------------------------------------------------------


async def run(mesh: Mesh) -> None:
    """Run a mesh, and show it, until SIGINT, SIGTERM or SIGHUP.

    Raises:
        CancelledError: a signal came, and everything is stopped.
    """
    began = time.monotonic()
    _cancel_on_signals()
    async with mesh:
        try:
            with _shown(mesh):
                await _stay_up(mesh, began)
        except asyncio.CancelledError:
            console.print("Stopping everything; Ctrl-C again does it at once.")
            raise


async def _stay_up(mesh: Mesh, began: float) -> None:
    await mesh.wait_ready()
    console.print(f"[bold green]Ready[/] after {time.monotonic() - began:.1f} s.\n")
    console.print(_how_to_reach(mesh.describe()))
    console.print("Ctrl-C stops it; so does `make down`.\n")
    await asyncio.Event().wait()


def _cancel_on_signals() -> None:
    # The first one ends the wait and stops things in order. A second one interrupts that, and
    # what is left is killed.
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def _shown(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    return _live_table(mesh) if console.is_terminal else _lines(mesh)


@contextlib.contextmanager
def _lines(mesh: Mesh) -> Iterator[None]:
    """Print one line a change, for logs."""
    seen: dict[str, tuple[str, int | None]] = {}

    def show(process: Process) -> None:
        now = (process.state.value, process.pid)
        if process.state is not State.STARTING and seen.get(process.name) != now:
            seen[process.name] = now
            pid = f"pid {process.pid}" if process.pid else ""
            console.print(f"{process.name:18} {process.state.value:10} {pid}".rstrip())

    mesh.listen(show)
    yield


@contextlib.contextmanager
def _live_table(mesh: Mesh) -> Iterator[None]:
    """Keep a table on the terminal up to date."""
    with Live(
        console=console,
        get_renderable=lambda: table_now(mesh.describe()),
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
    ):
        yield


def _how_to_reach(mesh: Mapping[str, Any]) -> str:
    return (
        f"  edge    {mesh['edge']}\n"
        f"  trust   {mesh['ca']}\n"
        f"  state   {mesh['state']}\n"
        f"  logs    {mesh['logs']}\n"
        f"  sockets {mesh['sockets']}\n"
        + (f"  metrics {mesh['prometheus']}\n" if mesh["prometheus"] else "")
        + "\n"
        f"  curl --cacert {mesh['ca']} {mesh['edge']}/.well-known/jwks.json\n"
    )


# --- in the background -------------------------------------------------------------------------


def _detach(layout: Layout, workers: int) -> None:
    # Also asked by the child. Here it keeps the log of the running mesh from being overwritten.
    if holder := holder_of(layout.state):
        _fail(str(AlreadyRunningError(layout.state, holder)))
    layout.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = layout.logs / "supervisor.log"
    with log.open("wb") as file:
        child = subprocess.Popen(
            (sys.executable, "-m", "local", "up", "--workers", str(workers)),
            cwd=CHECKOUT,
            env=os.environ | {"KIMBERLY_STATE": str(layout.state)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        mesh = _await_ready(layout, child)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if mesh is None:
        child.terminate()
        child.wait()
        _fail("\n".join(tail(log)))
    console.print(_how_to_reach(mesh))


def _await_ready(layout: Layout, child: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    deadline = time.monotonic() + DETACH_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        mesh = _read(layout)
        if mesh and mesh["pid"] == child.pid and mesh["ready"]:
            return mesh
        time.sleep(POLL_SECONDS)
    return None


def _running(layout: Layout) -> dict[str, Any] | None:
    holder: Identity | None = holder_of(layout.state)
    mesh = _read(layout)
    return mesh if holder and mesh and mesh["pid"] == holder.pid else None


def _read(layout: Layout) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(layout.endpoints.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content


def _fail(message: str) -> NoReturn:
    # Not through markup: a log line may hold square brackets.
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="red", markup=False)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
