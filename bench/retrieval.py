"""python -m bench.retrieval: how well and how fast a mesh finds what was said, others beside it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from bench import conversations, crowd
from bench.conversations import Conversation, DataError, Question
from bench.findings import Findings, Pressed, Ranked
from bench.judging import Answer, judge, mean
from bench.load import CLIENTS, latency_of, press
from bench.pace import pace
from bench.peers import beside
from bench.peers.beside import PeerError
from bench.progress import notices, step
from bench.telling import Teller, bare_stub, tell
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import DATABASE

_WARM_UP = 10
"""How many turns of each conversation are asked for before the clock runs."""

Ask = Callable[[Conversation, Question], Awaitable[Answer]]
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[
        Path, typer.Option(envvar="BENCH_DATA", help="The conversations, as JSON.")
    ] = conversations.DATA,
    peers: Annotated[
        Path, typer.Option(help="The environment that the peers are installed in.")
    ] = beside.HOME,
    others: Annotated[
        int, typer.Option("--crowd", min=0, help="Memories of other users; 0 for none.")
    ] = 0,
    other_users: Annotated[
        int, typer.Option("--crowd-users", min=1, help="How many users these belong to.")
    ] = 1_000,
    seconds: Annotated[
        float, typer.Option(min=0.5, help="How long each number of clients asks.")
    ] = 5.0,
    markdown: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option(help="Print the tables as Markdown.")
    ] = False,
) -> None:
    """Measure how well and how fast a mesh of its own finds what was said in conversations.

    Each conversation becomes a user's memories; each question has turns as its evidence.
    recall@k (R@k) of a question is the part of its evidence among the first k turns; hit@1 says
    whether the first one is evidence; MRR is 1 / the rank of the first evidence; session hit@5
    says whether a session with evidence is among the first five that the turns are of. All are
    averaged over the questions, and only the first 20 turns count.

    Beside the mesh stand LangGraph's PostgresStore and mem0, with the same vectors on the same
    Postgres. They are called within a process; the mesh is asked through its edge and a sidecar,
    with TLS, a token and consent.

    With --crowd, the mesh is measured once more among memories of other users. These are made up;
    a few of the users import theirs, and Postgres copies what came of it for the rest.

    Let nothing else run meanwhile. It takes two minutes, with a crowd of half a million five.
    """
    try:
        told = conversations.load(data)
    except DataError as error:
        notices.print(error)
        raise typer.Exit(1) from error
    if 0 < others < other_users:
        raise typer.BadParameter("each of the others has at least one memory")
    size = crowd.Size(others // other_users, other_users) if others else None
    findings = asyncio.run(_measure(told, size, peers / "bin" / "python", seconds))
    if markdown:
        print(findings.for_readme())
    else:
        _console().print(*findings.for_eyes(), sep="\n")


def _console() -> Console:
    # Into a file or a pipe nothing is squeezed.
    return Console(width=None if sys.stdout.isatty() else 160)


async def _measure(
    told: Sequence[Conversation], size: crowd.Size | None, python: Path, seconds: float
) -> Findings:
    async with _mesh() as mesh, tell(mesh, told, "importing") as tellers:
        await beside.tidy(mesh, DATABASE)
        alone = await _ours(mesh, tellers, seconds, others=0)
        peers = await _peers(mesh, told, python)
        if size is None:
            return alone + peers
        async with crowd.gathered(mesh, told, size):
            await beside.tidy(mesh, DATABASE)
            among = await _ours(mesh, tellers, seconds, others=size.memories)
        return alone + peers + among


@asynccontextmanager
async def _mesh() -> AsyncIterator[Mesh]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with Mesh(Layout(Path(directory)), workers=1) as mesh:
            await mesh.wait_ready()
            yield mesh


async def _ours(mesh: Mesh, tellers: Sequence[Teller], seconds: float, *, others: int) -> Findings:
    """Ask the mesh by words, and by words and meaning if there are vectors."""
    findings = Findings()
    for leg, by_meaning in (("lexical", False), ("hybrid", True)):
        if by_meaning and not _has_vectors(tellers[0].conversation):
            notices.print("Hybrid is left out: there are no vectors beside the conversations.")
            continue
        who = f"ours, {leg}"
        findings += await _rank_ours(mesh, tellers, who, by_meaning=by_meaning, others=others)
        for clients in CLIENTS:
            notices.print(f"{who}, {clients} clients; {pace()}")
            load = await press(mesh, tellers, clients, seconds, by_meaning=by_meaning)
            findings += Findings(pressed=[Pressed(who, others, load)])
    return findings


async def _rank_ours(
    mesh: Mesh, tellers: Sequence[Teller], who: str, *, by_meaning: bool, others: int
) -> Findings:
    teller_of = {teller.conversation: teller for teller in tellers}
    async with bare_stub(mesh) as stub:

        async def ask(conversation: Conversation, question: Question) -> Answer:
            return await teller_of[conversation].ask(stub, question, by_meaning=by_meaning)

        ranked = await _rank(who, list(teller_of), ask)
    if others:
        # The same questions again: a cache may know them.
        ranked = Ranked(f"{who}, among others", ranked.judgement, None)
    return Findings([ranked])


async def _peers(mesh: Mesh, told: Sequence[Conversation], python: Path) -> Findings:
    """Ask the peers that are installed."""
    if not _has_vectors(told[0]):
        notices.print("The peers are left out: there are no vectors beside the conversations.")
        return Findings()
    findings = Findings()
    for module in beside.MODULES:
        try:
            findings += Findings([await _peer(mesh, told, python, module)])
        except PeerError as error:
            notices.print(f"Left out: {error}")
    return findings


async def _peer(mesh: Mesh, told: Sequence[Conversation], python: Path, module: str) -> Ranked:
    vector = told[0].turns[0].vector
    assert vector is not None
    async with beside.running(python, module, mesh, len(vector)) as peer:
        await peer.tell(told)
        await beside.tidy(mesh, module)
        return await _rank(peer.name, told, peer.ask)


async def _rank(who: str, told: Sequence[Conversation], ask: Ask) -> Ranked:
    """Ask every question, one after the other."""
    for conversation in told:
        for turn in conversation.turns[:_WARM_UP]:
            await ask(conversation, Question(turn.line, frozenset(), turn.vector))
    judgements, seconds = [], []
    with step(who, sum(len(conversation.questions) for conversation in told)) as advance:
        for conversation in told:
            sessions = conversation.sessions
            for question in conversation.questions:
                answer = await ask(conversation, question)
                judgements.append(judge(answer.ranking, question.evidence, sessions))
                seconds.append(answer.seconds)
                advance(1)
    return Ranked(who, mean(judgements), latency_of(seconds))


def _has_vectors(conversation: Conversation) -> bool:
    return conversation.turns[0].vector is not None


if __name__ == "__main__":
    app()
