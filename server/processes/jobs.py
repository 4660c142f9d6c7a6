"""The jobs process: the queue, schedules, agents and the workers' streams."""

from contextlib import AsyncExitStack
from datetime import timedelta

import grpc
from kimberly.agents.v1 import agents_pb2_grpc
from kimberly.jobs.v1 import jobs_pb2_grpc

from server.agents.service import AgentService
from server.agents.store import AgentStore
from server.agents.task_store import TaskStore
from server.auth.agent_keys import AgentKeys
from server.backup.metrics import BackupReadings
from server.backup.run_store import RunStore
from server.erased import ErasedUsers
from server.jobs.doorbell import Doorbell
from server.jobs.forgetting import Forgetting
from server.jobs.metrics import JobReadings
from server.jobs.queue import PLANS_OF_QUEUE, Queue
from server.jobs.schedule_store import ScheduleStore
from server.jobs.schedules import Planner, Schedule
from server.jobs.service import JobService
from server.jobs.store import JobStore
from server.jobs.ticks import at_least_every
from server.jobs.watching import JobFeed
from server.jobs.worker_service import WorkerService
from server.processes.kinds import KINDS
from server.processes.parts import (
    Application,
    known_ended_grants,
    open_databases,
    open_remote_keys,
    open_toll,
    watch_seconds,
    worker_session_seconds,
)
from server.settings import Settings


async def compose(settings: Settings, stack: AsyncExitStack) -> Application:
    """Return what the jobs process serves; what it opened is closed with the stack."""
    database, system = await stack.enter_async_context(
        open_databases(settings, "jobs", PLANS_OF_QUEUE)
    )
    keys = await open_remote_keys(settings, stack)
    ended = await known_ended_grants(system)
    doorbell = Doorbell(settings.system_database_url.get_secret_value())
    queue = Queue(system, settings.lease_seconds, settings.job_limits)
    workers = WorkerService(
        queue,
        doorbell,
        lease_seconds=settings.lease_seconds,
        session_seconds=worker_session_seconds(settings),
    )
    schedules = ScheduleStore(database, system, KINDS)
    toll = open_toll(settings, stack, system)
    planner = Planner(system, _schedules(settings), schedules, toll.note_job if toll else None)
    store = JobStore(database, system, KINDS)
    feed = JobFeed(store, session_seconds=watch_seconds(settings))
    jobs = JobService(store, feed, schedules, KINDS)
    agents = AgentService(AgentStore(system, AgentKeys()), TaskStore(database), store.cancel)
    forgetting = Forgetting(
        queue, timedelta(days=settings.done_job_days), timedelta(days=settings.dead_job_days)
    )
    erased = ErasedUsers(system)
    readings = JobReadings(system)

    def announce_drain() -> None:
        workers.drain()
        feed.drain()

    def register(server: grpc.aio.Server) -> None:
        jobs_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)
        jobs_pb2_grpc.add_WorkerServiceServicer_to_server(workers, server)
        agents_pb2_grpc.add_AgentServiceServicer_to_server(agents, server)

    return Application(
        register,
        keys,
        ended,
        erased,
        toll,
        loops=[workers.run, planner.run, feed.run, forgetting.run],
        readings=[readings.waiting, readings.standing, BackupReadings(RunStore(system)).newest],
        announce_drain=announce_drain,
    )


def _schedules(settings: Settings) -> list[Schedule]:
    """Return when the mesh does what of its own accord."""
    return [
        Schedule(
            "meditation.nightly",
            settings.meditation_schedule,
            "meditation.plan",
            settings.meditation_time_zone,
        ),
        Schedule("keys.rewrap", settings.rewrap_schedule, "keys.rewrap"),
        Schedule("attachments.sweep", settings.sweep_schedule, "attachments.sweep"),
        Schedule("memories.sweep", settings.retention_schedule, "memories.sweep"),
        Schedule("short_term.promote", settings.promotion_schedule, "short_term.promote"),
        Schedule(
            "audit.checkpoint",
            at_least_every(settings.audit_checkpoint_seconds),
            "audit.checkpoint",
        ),
    ]
