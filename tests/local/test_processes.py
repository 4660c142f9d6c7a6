"""One child process: how it starts, dies, comes back and stops."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from local.lock import AlreadyRunningError, Identity, hold, holder_of
from local.ports import open_ports
from local.processes import (
    Backoff,
    Process,
    ProcessFailedError,
    Program,
    State,
    run_once,
    supervise,
)


async def always() -> bool:
    return True


async def never() -> bool:
    return False


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for is no event
            await asyncio.sleep(0.01)


def shell(directory: Path, script: str, *, stop_seconds: float = 3.0) -> Program:
    return Program(
        name="child",
        command=("/bin/sh", "-c", script),
        log=directory / "child.log",
        is_ready=always,
        directory=directory,
        stop_seconds=stop_seconds,
    )


def ready(process: Process) -> bool:
    return process.state is State.READY


async def test_killed_process_is_started_again(tmp_path: Path) -> None:
    async with supervise(tmp_path / "children") as supervisor:
        process = supervisor.start(shell(tmp_path, "exec sleep 60"), stage=0)
        await process.wait_ready()
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: process.restarts == 1)
        await process.wait_ready()
        assert process.pid not in {None, first}
    assert process.state is State.STOPPED


async def test_process_that_was_never_ready_fails_with_the_end_of_its_log(tmp_path: Path) -> None:
    async with supervise(tmp_path / "children") as supervisor:
        process = supervisor.start(
            Program(
                name="child",
                command=("/bin/sh", "-c", "echo KIMBERLY_X is missing >&2; exit 78"),
                log=tmp_path / "child.log",
                is_ready=never,
                directory=tmp_path,
            ),
            stage=0,
        )
        with pytest.raises(ProcessFailedError) as failure:
            await process.wait_ready()
    assert "child exited with 78" in str(failure.value)
    assert str(tmp_path / "child.log") in str(failure.value)
    assert "KIMBERLY_X is missing" in str(failure.value)
    assert process.restarts == 0, "a wrong configuration does not become right by trying again"


async def test_missing_program_fails_by_name(tmp_path: Path) -> None:
    program = Program("child", ("/no/such/program",), tmp_path / "child.log", always, tmp_path)
    with pytest.raises(ProcessFailedError, match="child exited with 127"):
        await run_once(program)


@pytest.mark.alone
async def test_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    program = shell(tmp_path, "trap '' TERM; while :; do sleep 0.1; done", stop_seconds=0.2)
    async with supervise(tmp_path / "children") as supervisor:
        process = supervisor.start(program, stage=0)
        await process.wait_ready()
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert process.pid is None


async def test_later_stages_stop_first(tmp_path: Path) -> None:
    stopped: list[str] = []
    async with supervise(tmp_path / "children") as supervisor:
        supervisor.listeners.append(
            lambda process: stopped.append(process.name) if not process.pid else None
        )
        for stage, name in ((2, "edge"), (0, "store"), (1, "service")):
            program = Program(
                name, ("/bin/sleep", "60"), tmp_path / f"{name}.log", always, tmp_path
            )
            await supervisor.start(program, stage=stage).wait_ready()
        stopped.clear()
    assert list(dict.fromkeys(stopped)) == ["edge", "service", "store"]


async def test_failing_body_still_stops_everything(tmp_path: Path) -> None:
    started: list[Process] = []

    async def body() -> None:
        async with supervise(tmp_path / "children") as supervisor:
            started.append(supervisor.start(shell(tmp_path, "exec sleep 60"), stage=0))
            await started[0].wait_ready()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert started[0].state is State.STOPPED


def test_pauses_grow_to_a_limit_and_shrink_after_good_health() -> None:
    backoff = Backoff(first_seconds=0.2, limit_seconds=1.0, healthy_seconds=30)
    assert [backoff.after(0) for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.after(31) == 0.2


def test_identity_is_not_that_of_another_process_with_the_same_pid() -> None:
    me = Identity.of(os.getpid())
    assert me is not None
    assert me.is_alive()
    other = Identity(me.pid, "another boot/1")
    assert not other.is_alive()
    other.send(signal.SIGKILL)  # or this test would end here


def test_state_directory_has_one_holder(tmp_path: Path) -> None:
    assert holder_of(tmp_path) is None
    with hold(tmp_path):
        assert holder_of(tmp_path) == Identity.of(os.getpid())
        with pytest.raises(AlreadyRunningError, match=f"pid {os.getpid()}"), hold(tmp_path):
            pass
    assert holder_of(tmp_path) is None


def test_ports_are_remembered_and_never_shared(tmp_path: Path) -> None:
    with open_ports(tmp_path / "a") as one, open_ports(tmp_path / "b") as other:
        first = one.claim("edge")
        one.save()
        assert other.claim("edge", preferred=[first]) != first
    with open_ports(tmp_path / "a") as again:
        assert again.claim("edge") == first


def test_port_that_somebody_took_is_replaced(tmp_path: Path) -> None:
    with open_ports(tmp_path / "a") as ports:
        first = ports.claim("edge")
        ports.save()
    with open_ports(tmp_path / "b") as thief, open_ports(tmp_path / "a") as ports:
        assert thief.claim("edge", preferred=[first]) == first
        assert ports.claim("edge") != first
