"""kimberly agents: who acts for you with a key of their own, and what they are given to do."""

from collections.abc import Sequence
from datetime import UTC
from typing import Annotated, Final

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.cli.connection import LOCAL_EDGE, Address, Ca, TokenFile, call
from kimberly.cli.jobs import NAMES, NOT_SO, until_ended
from kimberly.client import Client
from kimberly.jobs.v1 import jobs_pb2 as jobs

_KINDS: Final = {
    "external": pb.AGENT_KIND_EXTERNAL,
    "summarize-session": pb.AGENT_KIND_SUMMARIZE_SESSION,
}
_KIND_NAMES: Final = {kind: name for name, kind in _KINDS.items()}
_STATES: Final = {
    pb.AGENT_STATE_ENABLED: "enabled",
    pb.AGENT_STATE_DISABLED: "disabled",
    pb.AGENT_STATE_DELETED: "deleted",
}
_USUAL_SCOPES: Final = ("memory.read", "memory.write")

app = typer.Typer(
    help="Who acts for you with a key of their own: register them, give them tasks, end them.",
    no_args_is_help=True,
)

AgentId = Annotated[str, typer.Argument(metavar="AGENT_ID", help="Such as agt_0198c0f3….")]
TaskId = Annotated[str, typer.Argument(metavar="TASK_ID", help="Such as job_0198c0f3….")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")]


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    kind: Annotated[
        str, typer.Option(help=f"What it is: {', '.join(_KINDS)}.")
    ] = "summarize-session",
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"What it is good for; may be repeated. Without: {_USUAL_SCOPES}."),
    ] = None,
) -> None:
    """Register an agent and print its key, which is shown this once."""
    if kind not in _KINDS:
        raise typer.BadParameter(f"must be one of {', '.join(_KINDS)}", param_hint="--kind")
    request = pb.RegisterAgentRequest(
        name=name, kind=_KINDS[kind], scopes=scope or list(_USUAL_SCOPES)
    )

    async def work(client: Client) -> pb.RegisterAgentResponse:
        return await client.agents.RegisterAgent(request)

    made = call(work, address, ca, token_file)
    _show([made.agent], as_json=False, to_error=True)
    typer.echo(made.key)


@app.command("list")
def list_(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """List your agents, the newest first."""

    async def work(client: Client) -> Sequence[pb.Agent]:
        return (await client.agents.ListAgents(pb.ListAgentsRequest())).agents

    _show(call(work, address, ca, token_file), as_json=as_json)


@app.command()
def disable(
    agent_id: AgentId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Keep an agent from doing anything until it is enabled."""

    async def work(client: Client) -> pb.Agent:
        return (await client.agents.DisableAgent(pb.DisableAgentRequest(id=agent_id))).agent

    _show([call(work, address, ca, token_file)], as_json=False)


@app.command()
def enable(
    agent_id: AgentId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Let an agent act again."""

    async def work(client: Client) -> pb.Agent:
        return (await client.agents.EnableAgent(pb.EnableAgentRequest(id=agent_id))).agent

    _show([call(work, address, ca, token_file)], as_json=False)


@app.command()
def delete(
    agent_id: AgentId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """End an agent for good, and its key with it."""

    async def work(client: Client) -> None:
        await client.agents.DeleteAgent(pb.DeleteAgentRequest(id=agent_id))

    call(work, address, ca, token_file)


@app.command("rotate-key")
def rotate_key(
    agent_id: AgentId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Print another key of an agent; the one that it had ends."""

    async def work(client: Client) -> pb.RotateAgentKeyResponse:
        return await client.agents.RotateAgentKey(pb.RotateAgentKeyRequest(id=agent_id))

    typer.echo(call(work, address, ca, token_file).key)


@app.command()
def run(
    agent_id: AgentId,
    session: Annotated[str, typer.Option(help="The conversation to summarise.")],
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    sentences: Annotated[int, typer.Option(help="How many sentences the summary has.")] = 5,
    follow: Annotated[bool, typer.Option("--watch", help="Watch it until it has ended.")] = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Give an agent a task and print its id; with --watch: 0 it succeeded, 1 it did not."""
    asked = pb.SummarizeSession(session_id=session, sentences=sentences)
    request = pb.RunAgentTaskRequest(agent_id=agent_id, summarize_session=asked)

    async def work(client: Client) -> pb.AgentTask:
        task = (await client.agents.RunAgentTask(request)).task
        return await _ended(client, task.id) if follow else task

    task = call(work, address, ca, token_file)
    if not follow:
        typer.echo(task.id)
        return
    _tell(task)


@app.command()
def watch(
    task_id: TaskId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Watch a task until it has ended: 0 it succeeded, 1 it did not."""

    async def work(client: Client) -> pb.AgentTask:
        return await _ended(client, task_id)

    _tell(call(work, address, ca, token_file))


@app.command()
def tasks(
    agent_id: AgentId,
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many tasks at most.")] = 100,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """List the tasks of an agent, the newest first."""
    request = pb.ListAgentTasksRequest(agent_id=agent_id, page_size=limit)

    async def work(client: Client) -> Sequence[pb.AgentTask]:
        return (await client.agents.ListAgentTasks(request)).tasks

    found = call(work, address, ca, token_file)
    if as_json:
        _print_lines(found)
        return
    table = Table("task", "conversation", "state", "progress", "summary", "error")
    for task in found:
        table.add_row(
            *(task.id, task.summarize_session.session_id, NAMES[task.state]),
            *(f"{task.progress:.0%}", task.summary.memory_id, task.error),
        )
    Console(soft_wrap=True, markup=False).print(table)


@app.command()
def cancel(
    task_id: TaskId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Cancel a task. One that runs ends as soon as its worker has stopped."""

    async def work(client: Client) -> None:
        await client.agents.CancelAgentTask(pb.CancelAgentTaskRequest(id=task_id))

    call(work, address, ca, token_file)


async def _ended(client: Client, task_id: str) -> pb.AgentTask:
    await until_ended(client, task_id)
    return (await client.agents.GetAgentTask(pb.GetAgentTaskRequest(id=task_id))).task


def _tell(task: pb.AgentTask) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("task", task.id)
    table.add_row("state", NAMES[task.state])
    if task.HasField("summary"):
        table.add_row("summary", task.summary.memory_id)
        table.add_row("turns read", str(task.summary.turns))
    if task.error:
        table.add_row("error", task.error)
    Console(soft_wrap=True, markup=False).print(table)
    if task.state != jobs.JOB_STATE_SUCCEEDED:
        raise typer.Exit(NOT_SO)


def _show(agents: Sequence[pb.Agent], *, as_json: bool, to_error: bool = False) -> None:
    if as_json:
        _print_lines(agents)
        return
    table = Table("agent", "name", "kind", "state", "scopes", "key", "key ends (UTC)")
    for agent in agents:
        table.add_row(
            *(agent.id, agent.name, _KIND_NAMES[agent.kind], _STATES[agent.state]),
            *(" ".join(agent.scopes), agent.key_prefix, _time(agent.key_expire_time)),
        )
    # The key alone goes to the output, so that it can be kept without being seen.
    Console(soft_wrap=True, markup=False, stderr=to_error).print(table)


def _print_lines(messages: Sequence[Message]) -> None:
    for message in messages:
        typer.echo(json_format.MessageToJson(message, indent=None))


def _time(instant: Timestamp) -> str:
    return instant.ToDatetime(tzinfo=UTC).isoformat(" ", "seconds").removesuffix("+00:00")
