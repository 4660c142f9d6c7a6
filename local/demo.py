"""The main job on real input: sign up, import a conversation, ask, meditate, report."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.client import Client, connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

SAMPLE = Path(__file__).parent / "samples" / "talk.jsonl"
SAMPLE_QUESTIONS = Path(__file__).parent / "samples" / "questions.json"

_SESSION_GAP = timedelta(hours=1)
_CHUNK = 200
_MEDITATION_SECONDS = 60.0
_QUESTIONS = 3
_ANSWERS = 3
_WORDS_TO_ASK_FOR = 6


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


class TranscriptError(DemoError):
    """The transcript cannot be read; the text says which line and why."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that somebody said."""

    speaker: str
    text: str
    said_at: datetime


@dataclass(slots=True)
class Report:
    """What the demo did and how long each step took."""

    steps: list[tuple[str, str, float]] = field(default_factory=list)
    """Step, outcome, seconds."""

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a step; the function that is yielded takes what came of it."""
        outcome = ""

        def tell(text: str) -> None:
            nonlocal outcome
            outcome = text

        started = time.perf_counter()
        yield tell
        self.steps.append((name, outcome, time.perf_counter() - started))


def read_transcript(path: Path) -> list[Turn]:
    """Read JSON Lines of speaker, text, time (RFC 3339).

    Raises:
        TranscriptError: A line is not such an object, or there is none.
    """
    turns = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            turns.append(_turn(line, f"{path}, line {number}"))
    if not turns:
        raise TranscriptError(f"{path} holds no turns")
    return turns


def _turn(line: str, place: str) -> Turn:
    try:
        entry = json.loads(line)
        said_at = datetime.fromisoformat(entry["time"])
        turn = Turn(str(entry["speaker"]), str(entry["text"]), said_at)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise TranscriptError(
            f"{place}: {problem}; each line is an object with speaker, text and time, such as "
            '{"speaker": "Ann", "text": "Hello!", "time": "2026-05-04T12:00:00Z"}'
        ) from error
    return turn if said_at.tzinfo else Turn(turn.speaker, turn.text, said_at.replace(tzinfo=UTC))


def to_memories(turns: list[Turn]) -> list[memory.Memory]:
    """Return the turns as memories; an hour of silence begins a new session."""
    memories: list[memory.Memory] = []
    session, position, last = 0, 0, turns[0].said_at
    for turn in turns:
        if turn.said_at - last > _SESSION_GAP:
            session, position = session + 1, 0
        occurred = Timestamp()
        occurred.FromDatetime(turn.said_at)
        memories.append(
            memory.Memory(
                content=turn.text,
                speaker=turn.speaker,
                occur_time=occurred,
                session_id=f"session-{session + 1}",
                session_position=position,
            )
        )
        position, last = position + 1, turn.said_at
    return memories


def questions_about(path: Path, turns: list[Turn]) -> list[str]:
    """Return three questions: the sample's own, or the longest words of three turns."""
    if path == SAMPLE:
        return [entry["question"] for entry in json.loads(SAMPLE_QUESTIONS.read_text())]
    spread = [turns[len(turns) * part // _QUESTIONS] for part in range(_QUESTIONS)]
    return [" ".join(sorted(t.text.split(), key=len)[-_WORDS_TO_ASK_FOR:]) for t in spread]


async def run(
    address: str,
    ca: Path,
    turns: list[Turn],
    questions: list[str],
    report: Report,
    console: Console,
) -> None:
    """Do the main job against a running mesh and print the report.

    Raises:
        DemoError: The mesh refused a step, or took too long.
    """
    try:
        async with connect(address, ca) as client:
            await _sign_up(client, report)
            await _import(client, to_memories(turns), report, console)
            meditation = await _meditate(client, report, console)
            answers = await _ask(client, questions, report)
            await _verify_audit(client, report)
    except grpc.aio.AioRpcError as error:
        raise DemoError(f"the mesh answered {error.code().name}: {error.details()}") from error
    except TimeoutError as error:
        raise DemoError(f"the meditation took over {_MEDITATION_SECONDS:.0f} s") from error
    console.print(_answers_table(answers), _meditation_table(meditation), _steps_table(report))


async def _sign_up(client: Client, report: Report) -> None:
    with report.step("sign up, consent") as tell:
        email = f"demo-{secrets.token_hex(6)}@example.com"
        answer = await client.sign_up(email, secrets.token_urlsafe(18))
        await client.users.RecordConsent(
            users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True)
        )
        tell(answer.user_id)


async def _import(
    client: Client, memories: list[memory.Memory], report: Report, console: Console
) -> None:
    with report.step("import") as tell, _progress(console) as progress:
        task = progress.add_task("importing", total=len(memories))

        async def chunks() -> AsyncIterator[memory.ImportMemoriesRequest]:
            for start in range(0, len(memories), _CHUNK):
                chunk = memories[start : start + _CHUNK]
                yield memory.ImportMemoriesRequest(first_index=start, memories=chunk)
                progress.advance(task, len(chunk))

        outcome = await client.memory.ImportMemories(chunks())
        for refusal in outcome.refusals:
            console.print(f"[yellow]turn {refusal.index}: {refusal.field} {refusal.message}")
        tell(
            f"{outcome.created} memories imported, {outcome.existing} known, "
            f"{outcome.refused} refused"
        )


Answers = list[tuple[str, list[memory.Match]]]


async def _ask(client: Client, questions: list[str], report: Report) -> Answers:
    with report.step("query") as tell:
        answers = [(question, await _best(client, question)) for question in questions]
        tell(f"{sum(bool(best) for _, best in answers)} of {len(answers)} answered")
    return answers


async def _best(client: Client, question: str) -> list[memory.Match]:
    request = memory.QueryMemoriesRequest(query=question, top_k=_ANSWERS)
    return list((await client.memory.QueryMemories(request)).matches)


async def _meditate(client: Client, report: Report, console: Console) -> memory.Meditation:
    with report.step("meditation") as tell, _progress(console) as progress:
        run = (await client.memory.Meditate(memory.MeditateRequest())).meditation
        task = progress.add_task("meditating", total=run.shards)

        async def finished() -> memory.Meditation:
            while True:
                request = memory.GetMeditationRequest(id=run.id)
                seen = (await client.memory.GetMeditation(request)).meditation
                progress.update(task, completed=seen.shards_done)
                if seen.state == memory.MEDITATION_STATE_SUCCEEDED:
                    return seen
                await asyncio.sleep(0.05)

        done = await _within(_MEDITATION_SECONDS, finished)
        tell(f"{done.scored} memories scored")
    return done


async def _within(
    seconds: float, work: Callable[[], Awaitable[memory.Meditation]]
) -> memory.Meditation:
    async with asyncio.timeout(seconds):
        return await work()


async def _verify_audit(client: Client, report: Report) -> None:
    with report.step("audit chain") as tell:
        found = await client.users.VerifyAuditLog(users.VerifyAuditLogRequest())
        if not found.intact:
            raise DemoError(f"the audit chain is broken: {found.problem}")
        tell(f"verified, {found.verified_events} events, head {found.head_hash[:12]}")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True)


def _answers_table(answers: Answers) -> Table:
    table = Table(title="Three questions and their best memories", title_justify="left")
    for heading in ("match", "memory", "said by", "score", "why"):
        table.add_column(heading, overflow="fold")
    for question, best in answers:
        table.add_row("", f"[bold]{question}")
        for match in best:
            said = match.memory
            worth = f"{said.score.value:.3f}" if said.HasField("score") else "-"
            table.add_row(f"{match.score:.3f}", said.content, said.speaker, worth, match.reason)
        table.add_section()
    return table


def _meditation_table(run: memory.Meditation) -> Table:
    table = Table(title="Meditation", title_justify="left", show_header=False)
    table.add_row("run", run.id)
    table.add_row("as of", run.as_of_time.ToDatetime().isoformat(" ", "seconds") + " UTC")
    table.add_row("shards done", f"{run.shards_done} of {run.shards}")
    table.add_row("memories scored", str(run.scored))
    table.add_row("mean score", f"{run.mean_score:.3f}")
    table.add_row("scorer version", str(run.scorer_version))
    table.add_row("duration", f"{run.duration.ToTimedelta().total_seconds():.2f} s")
    return table


def _steps_table(report: Report) -> Table:
    table = Table(title="Steps", title_justify="left", show_footer=True)
    table.add_column("step", "total")
    table.add_column("outcome")
    total = sum(seconds for _, _, seconds in report.steps)
    table.add_column("seconds", f"{total:.2f}", justify="right")
    for name, outcome, seconds in report.steps:
        table.add_row(name, outcome, f"{seconds:.2f}")
    return table
