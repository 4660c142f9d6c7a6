"""Tasks of agents: jobs of the queue, three at once, whoever asks for them and however."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2 as jobs

from server import ids
from server.agents.model import MOST_TASKS
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.errors import StateConflict
from server.grants import EndedGrants
from server.jobs.store import JobStore
from server.processes.kinds import KINDS
from server.tokens import TokenVerifier
from tests.acting import let_agents
from tests.agents.conftest import Desk, desk_of
from tests.auth.conftest import Auth
from tests.conftest import bearer
from tests.refusals import refusal_of


@pytest_asyncio.fixture
async def agent(desk: Desk) -> pb.Agent:
    return (await desk.register()).agent


@pytest.fixture
def queue(database: Database, system_database: SystemDatabase) -> JobStore:
    return JobStore(database, system_database, KINDS)


def job_of(task: pb.AgentTask) -> Any:
    return ids.parse(ids.JOB, task.id, "id")


async def test_a_task_is_a_job_that_its_user_sees(
    desk: Desk, agent: pb.Agent, queue: JobStore
) -> None:
    task = await desk.run(agent)
    assert (task.agent_id, task.state) == (agent.id, jobs.JOB_STATE_WAITING)
    assert (task.summarize_session.session_id, task.summarize_session.sentences) == ("a talk", 5)
    job = await queue.get(desk.user, job_of(task))
    assert job.kind == "agents.summarize_session"
    shown = (await desk.call("GetAgentTask", pb.GetAgentTaskRequest(id=task.id))).task
    assert shown == task


async def test_of_many_asked_for_at_once_three_are_under_way(
    desk: Desk, agent: pb.Agent, owner: asyncpg.Connection
) -> None:
    asked = await asyncio.gather(
        *(desk.run(agent) for _ in range(4 * MOST_TASKS)), return_exceptions=True
    )
    refused = [each for each in asked if isinstance(each, grpc.aio.AioRpcError)]
    assert len(asked) - len(refused) == MOST_TASKS
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert await owner.fetchval("SELECT count(*) FROM jobs") == MOST_TASKS


async def test_three_are_under_way_of_all_agents_of_a_user_and_of_each_user(
    desk: Desk,
    agent: pb.Agent,
    agents: Any,
    auth: Auth,
    verifier: TokenVerifier,
    ended: EndedGrants,
    database: Database,
) -> None:
    another = (await desk.register()).agent
    for each in (agent, another, agent):
        await desk.run(each)
    assert (await refusal_of(desk.run(another))).reason == "QUOTA_EXCEEDED"
    other = await desk_of(agents, auth, verifier, ended, database, "eve@example.com")
    await other.run((await other.register()).agent)


async def test_where_a_task_ended_there_is_room_and_a_retry_takes_no_fourth_place(
    desk: Desk, agent: pb.Agent, queue: JobStore
) -> None:
    tasks = [await desk.run(agent) for _ in range(MOST_TASKS)]
    await desk.call("CancelAgentTask", pb.CancelAgentTaskRequest(id=tasks[1].id))
    await desk.run(agent)
    with pytest.raises(StateConflict):
        await queue.retry(desk.user, job_of(tasks[1]))


async def test_a_retry_of_the_request_makes_no_second_task(desk: Desk, agent: pb.Agent) -> None:
    first = await desk.run(agent, request_id="once")
    for _ in range(MOST_TASKS):
        assert await desk.run(agent, request_id="once") == first
    another = (await desk.register()).agent
    refusal = await refusal_of(desk.run(another, request_id="once"))
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_tasks_are_listed_by_agent_the_newest_first(desk: Desk, agent: pb.Agent) -> None:
    another = (await desk.register()).agent
    mine = [await desk.run(agent), await desk.run(agent)]
    other = await desk.run(another)
    request = pb.ListAgentTasksRequest(agent_id=agent.id, page_size=1)
    first = await desk.call("ListAgentTasks", request)
    request.page_token = first.next_page_token
    second = await desk.call("ListAgentTasks", request)
    assert [*first.tasks, *second.tasks] == mine[::-1]
    assert not second.next_page_token
    request.agent_id = another.id
    assert (await refusal_of(desk.call("ListAgentTasks", request))).reason == "PAGE_TOKEN_INVALID"
    whole = pb.ListAgentTasksRequest(agent_id=another.id)
    assert list((await desk.call("ListAgentTasks", whole)).tasks) == [other]


async def test_cancelling_ends_a_task(desk: Desk, agent: pb.Agent) -> None:
    task = await desk.run(agent)
    cancelled = await desk.call("CancelAgentTask", pb.CancelAgentTaskRequest(id=task.id))
    assert cancelled.task.state == jobs.JOB_STATE_CANCELLED


@pytest.mark.parametrize("method", ["DisableAgent", "DeleteAgent"])
async def test_the_tasks_of_an_agent_that_may_not_act_are_cancelled(
    desk: Desk, agent: pb.Agent, method: str
) -> None:
    task = await desk.run(agent)
    other = await desk.run((await desk.register()).agent)
    await desk.call(method, getattr(pb, f"{method}Request")(id=agent.id))
    states = [
        (await desk.call("GetAgentTask", pb.GetAgentTaskRequest(id=each.id))).task.state
        for each in (task, other)
    ]
    assert states == [jobs.JOB_STATE_CANCELLED, jobs.JOB_STATE_WAITING]
    assert (await refusal_of(desk.run(agent))).reason == "STATE_CONFLICT"


async def test_without_the_consent_no_task_begins(
    desk: Desk, agent: pb.Agent, database: Database
) -> None:
    await let_agents(database, desk.user, granted=False)
    assert (await refusal_of(desk.run(agent))).reason == "CONSENT_MISSING"


async def test_an_agent_that_runs_elsewhere_has_no_tasks(desk: Desk) -> None:
    agent = (await desk.register(kind=pb.AGENT_KIND_EXTERNAL)).agent
    refusal = await refusal_of(desk.run(agent))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("task",))


@pytest.mark.parametrize(
    ("doing", "field"),
    [
        (None, "task"),
        (pb.SummarizeSession(), "summarize_session.session_id"),
        (pb.SummarizeSession(session_id="a\0b"), "summarize_session.session_id"),
        (pb.SummarizeSession(session_id="x" * 129), "summarize_session.session_id"),
        (pb.SummarizeSession(session_id="a", sentences=-1), "summarize_session.sentences"),
        (pb.SummarizeSession(session_id="a", sentences=21), "summarize_session.sentences"),
    ],
)
async def test_what_no_agent_can_do_is_refused(
    desk: Desk, agent: pb.Agent, doing: pb.SummarizeSession | None, field: str
) -> None:
    request = pb.RunAgentTaskRequest(agent_id=agent.id, summarize_session=doing)
    refusal = await refusal_of(desk.call("RunAgentTask", request))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


async def test_somebody_elses_task_and_other_jobs_are_no_tasks(
    desk: Desk, agent: pb.Agent, agents: Any, owner: asyncpg.Connection
) -> None:
    task = await desk.run(agent)
    stranger = Caller(ids.new_id(), ids.new_id())
    of_tenant = Caller(desk.user.tenant_id, ids.new_id())
    requests = {
        "GetAgentTask": pb.GetAgentTaskRequest(id=task.id),
        "CancelAgentTask": pb.CancelAgentTaskRequest(id=task.id),
        "ListAgentTasks": pb.ListAgentTasksRequest(agent_id=agent.id),
        "RunAgentTask": pb.RunAgentTaskRequest(
            agent_id=agent.id, summarize_session=pb.SummarizeSession(session_id="mine")
        ),
    }
    for caller in (stranger, of_tenant):
        for method, request in requests.items():
            call = getattr(agents, method)(request, metadata=bearer(caller))
            assert (await refusal_of(call)).reason == "RESOURCE_NOT_FOUND", method
    await owner.execute("UPDATE jobs SET kind = 'embedding.batch'")
    for method in ("GetAgentTask", "CancelAgentTask"):
        refusal = await refusal_of(desk.call(method, requests[method]))
        assert refusal.reason == "RESOURCE_NOT_FOUND"
