"""python -m bench.logging_in: what logging in and being known cost, and what the times give away.

Log-ins a second and the memory of auth meanwhile, with the Argon2 parameters that are shipped;
five hundred refusals each of an unknown email, a wrong password and an account that waits, with the
statistic that would tell them apart; and what a service does to know who calls.
"""

import asyncio
import secrets
import statistics
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import grpc
import psutil
import typer
from joserfc.jwk import ECKey
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.client import Client, connect

from bench.distributions import chances
from bench.measure import rate
from bench.table import Markdown, Row, show
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import SUPERUSER
from server import ids
from server.access import Scope
from server.auth.access_tokens import Mint
from server.caller import Caller, Credentials
from server.clock import utc_now
from server.tokens import PublicKeys, TokenVerifier

PASSWORD = "correct horse battery staple"
PEOPLE = 100
REFUSALS = 500
AT_ONCE = 16
SECONDS = 10.0
CHECKS = 20_000
_MIB = 1024 * 1024

app = typer.Typer(add_completion=False)


@app.command()
def main(
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure. Let nothing else run meanwhile; it takes two minutes."""
    rows = asyncio.run(_measure())
    show(rows, markdown=markdown)


async def _measure() -> list[Row]:
    rows = await _checks()
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with Mesh(Layout(Path(directory))) as mesh:
            await mesh.wait_ready()
            async with connect(mesh.edge.removeprefix("https://"), mesh.ca) as client:
                emails = [f"{secrets.token_hex(8)}@example.com" for _ in range(PEOPLE)]
                for email in emails:
                    await client.auth.SignUp(auth.SignUpRequest(email=email, password=PASSWORD))
                rows += await _log_ins(mesh, client, emails)
                rows += await _refusals(mesh, client, emails)
    return rows


# --- logging in --------------------------------------------------------------------------------


async def _log_ins(mesh: Mesh, client: Client, emails: list[str]) -> list[Row]:
    turns = iter(range(1 << 30))

    async def log_in() -> None:
        email = emails[next(turns) % len(emails)]
        await client.auth.LogIn(auth.LogInRequest(email=email, password=PASSWORD))

    pid = mesh.process("auth").pid
    assert pid is not None
    process, peak = psutil.Process(pid), 0
    before = process.memory_info().rss

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    per_second = await rate(log_in, seconds=SECONDS, at_once=AT_ONCE)
    watching.cancel()
    return [
        Row("log-ins", f"{per_second:.0f}/s", f"{AT_ONCE} at once, Argon2id 19 MiB, two passes"),
        Row(
            "memory of auth meanwhile", f"{peak / _MIB:.0f} MiB", f"before: {before / _MIB:.0f} MiB"
        ),
    ]


# --- what the times give away ------------------------------------------------------------------


async def _refusals(mesh: Mesh, client: Client, emails: list[str]) -> list[Row]:
    waiting, wrong = emails[0], emails[1:]
    await _refused(client, waiting)
    await _hold_up(mesh)
    times: dict[str, list[float]] = {"unknown": [], "wrong": [], "waiting": []}
    for number in range(REFUSALS):
        asked = {
            "unknown": f"{secrets.token_hex(8)}@example.com",
            # Not so often that it waits, too.
            "wrong": wrong[number % len(wrong)],
            "waiting": waiting,
        }
        for kind in secrets.SystemRandom().sample(sorted(asked), 3):
            times[kind].append(await _refused(client, asked[kind]))
    return [
        Row(f"{kind}: p50 / p99", _percentiles(taken), f"{REFUSALS} refused log-ins")
        for kind, taken in times.items()
    ] + [
        Row(
            "Kolmogorov and Smirnov's p, pairwise",
            _told_apart(times),
            "over 0.05: not told apart at 5 %; one pair in 20 is by chance",
        )
    ]


async def _hold_up(mesh: Mesh) -> None:
    """Have whoever failed until now wait for an hour."""
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    await connection.execute(
        "UPDATE log_in_attempts SET blocked_until = now() + interval '1 hour' WHERE failures > 0"
    )
    await connection.close()


async def _refused(client: Client, email: str) -> float:
    started = time.perf_counter()
    try:
        await client.auth.LogIn(auth.LogInRequest(email=email, password="not the password"))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        return (time.perf_counter() - started) * 1000
    raise AssertionError("a wrong password logs in")


def _percentiles(taken: list[float]) -> str:
    cuts = statistics.quantiles(taken, n=100)
    return f"{cuts[49]:.1f} / {cuts[98]:.1f} ms"


def _told_apart(times: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{chance:.2f}" for _, _, chance in chances(times))


# --- being known -------------------------------------------------------------------------------


class OneKey:
    """One key, which never changes."""

    def __init__(self, key: ECKey) -> None:
        self.keys: PublicKeys = {str(key.kid): key}

    async def refresh(self) -> None:
        """Look for no other."""


async def _checks() -> list[Row]:
    key = ECKey.generate_key("P-256", auto_kid=True)
    mint = Mint("https://bench", "bench", timedelta(minutes=10))
    ended = {ids.new_id() for _ in range(10_000)}
    verifier = TokenVerifier(OneKey(key), issuer="https://bench", audience="bench", ended=ended)
    caller, now = Caller(ids.new_id(), ids.new_id()), utc_now()
    tokens = [
        mint.make(
            Credentials(caller, ids.SESSION, ids.new_id(), frozenset({Scope.USER.value})),
            key,
            now,
            now + mint.lifetime,
        )
        for _ in range(1000)
    ]
    first = await _microseconds(verifier, tokens)
    known = await _microseconds(verifier, tokens * (CHECKS // len(tokens)))
    return [
        Row("a service checks a token it has seen", f"{known:.1f} µs", "goal: 300 µs"),
        Row(
            "a service checks a token for the first time", f"{first:.0f} µs", "one ES256 signature"
        ),
    ]


async def _microseconds(verifier: TokenVerifier, tokens: list[str]) -> float:
    started = time.perf_counter()
    for token in tokens:
        await verifier.verify(token)
    return (time.perf_counter() - started) / len(tokens) * 1e6


if __name__ == "__main__":
    app()
