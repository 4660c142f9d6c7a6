"""Jobs that users ask for are counted, once each, and none that was refused."""

from __future__ import annotations

import asyncpg
import pytest
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server.billing.plans import Usage
from server.billing.store import BillingStore
from server.billing.toll import Toll
from server.cache import Redis
from server.caller import Caller
from server.database import SystemDatabase
from tests.conftest import bearer
from tests.jobs import test_job_service as of_jobs
from tests.refusals import refusal_of

feed, jobs = of_jobs.feed, of_jobs.jobs


@pytest.fixture
def billing(system_database: SystemDatabase) -> BillingStore:
    return BillingStore(system_database)


@pytest.fixture
def gate(redis: Redis, billing: BillingStore) -> Toll:
    """Counts, and writes down what it counted only when a test asks."""
    return Toll(redis, billing)


async def test_a_job_counts_when_it_is_asked_for_and_again_when_it_is_retried(
    jobs: rpc.JobServiceAsyncStub,
    gate: Toll,
    billing: BillingStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    mine = bearer(caller)
    # One call, two entries in the audit log: that of the job and that of the run.
    made = await jobs.CreateJob(pb.CreateJobRequest(kind="meditation.run"), metadata=mine)
    await refusal_of(jobs.CreateJob(pb.CreateJobRequest(kind="no such kind"), metadata=mine))
    retry = pb.RetryJobRequest(id=made.job.id)
    # It is under way: there is nothing to do.
    await jobs.RetryJob(retry, metadata=mine)
    await gate.flush()
    (month,) = await billing.used(caller)
    assert month.used == Usage(jobs=1)
    await owner.execute("UPDATE jobs SET state = 'dead', finished_at = now()")
    await jobs.RetryJob(retry, metadata=mine)
    await gate.flush()
    (month,) = await billing.used(caller)
    assert month.used == Usage(jobs=2)
