"""`kimberly audit`: a user who takes nobody's word for the log, and how the command ends."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from kimberly import audit as client
from kimberly.cli import app
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc
from typer.testing import CliRunner

from server import audit, ids
from server.blobs import Blobs
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.users import checkpoints
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from server.users.consent_store import ConsentStore
from server.users.service import UserService
from server.users.store import UserStore
from server.users.tenant_audits import TenantAudits
from server.users.withdrawal_archive import WithdrawalArchive
from tests.commands import Command, command_of, token_of
from tests.conftest import FakeClock, Serve, Urls, bearer, new_caller
from tests.signing import sign_all
from tests.users.conftest import Users
from tests.users.tampering import CARELESS, EVENTS, THOROUGH, act, tampered

CHECKOUT = Path(__file__).parent.parent.parent


async def new_user(system: SystemDatabase, caller: Caller) -> Caller:
    """Have the caller own an account."""
    async with system.transaction() as connection:
        await connection.execute(
            "INSERT INTO tenants (id, created_at) VALUES ($1, now()) ON CONFLICT DO NOTHING",
            caller.tenant_id,
        )
        await connection.execute(
            """
            INSERT INTO users (tenant_id, id, email, display_name, created_at)
            VALUES ($1, $2, $3, 'Ann', now())
            """,
            caller.tenant_id,
            caller.user_id,
            f"{caller.user_id.hex}@example.com",
        )
    return caller


@pytest_asyncio.fixture
async def ann(system_database: SystemDatabase, caller: Caller) -> Caller:
    """A user with an account."""
    return await new_user(system_database, caller)


def honest(answer: Any) -> Any:
    return answer


@dataclass(frozen=True, slots=True)
class Acting:
    """A stub that calls as one user; or one whose server changes its answers first."""

    users: Users
    caller: Caller
    lie: Callable[[Any], Any] = honest

    def __getattr__(self, method: str) -> Any:
        async def call(request: Any) -> Any:
            answer = await getattr(self.users, method)(request, metadata=bearer(self.caller))
            return self.lie(answer)

        return call


async def seen(users: Users, caller: Caller, **options: Any) -> client.Report:
    return await client.verify(Acting(users, caller), **options)  # type: ignore[arg-type]


def place_of(report: client.Report) -> int:
    assert report.broken
    return report.broken.position


# --- what the client finds by itself -----------------------------------------------------------


async def test_the_client_computes_the_very_chain_of_the_server(
    users: Users, database: Database, ann: Caller, checkpointer: Checkpointer, audit_log: AuditLog
) -> None:
    await act(database, ann, EVENTS)
    async with database.transaction(ann) as connection:
        await audit.record(connection, ann, "memory.création", "mémoire\U0001f9e0")
    await audit_log.seal()
    await sign_all(checkpointer)
    await act(database, ann, 2)
    report = await seen(users, ann)
    answer = await users.VerifyAuditLog(pb.VerifyAuditLogRequest(), metadata=bearer(ann))
    assert report.broken is None
    assert (report.receipt.position, report.receipt.hash) == (EVENTS + 3, answer.head_hash)
    assert report.checkpoint
    assert (report.checkpoint.position, report.withheld) == (EVENTS + 1, 0)


async def test_an_empty_log_is_intact(users: Users, ann: Caller) -> None:
    report = await seen(users, ann)
    assert (report.broken, report.receipt.position, report.checkpoint) == (None, 0, None)


def without_a_finding(answer: Any) -> Any:
    """As a server would answer that verifies nothing, or has been told not to."""
    if isinstance(answer, pb.VerifyAuditLogResponse):
        answer.ClearField("first_broken_position")
        answer.ClearField("problem")
        answer.intact, answer.verified_events, answer.head_hash = True, 0, ""
    return answer


@pytest.mark.parametrize("name", sorted(CARELESS.keys() - {"insert", "cut the tail"}))
async def test_careless_tampering_is_found_though_the_server_says_intact(
    name: str, users: Users, urls: Urls, database: Database, ann: Caller, audit_log: AuditLog
) -> None:
    other = await new_caller(database)
    for each in (ann, other):
        await act(database, each, EVENTS)
    await audit_log.seal()
    before = await seen(users, ann)
    await tampered(urls.owner, ann, *CARELESS[name])
    lying = Acting(users, ann, without_a_finding)
    blind = await client.verify(lying, last=before.receipt)  # type: ignore[arg-type]
    assert place_of(blind) == (1 if name == "rehash from the middle" else 8)


@pytest.mark.parametrize("name", THOROUGH)
async def test_thorough_tampering_is_found_though_the_server_says_intact(
    name: str,
    users: Users,
    urls: Urls,
    database: Database,
    ann: Caller,
    audit_log: AuditLog,
    checkpointer: Checkpointer,
) -> None:
    other = await new_caller(database)
    for each in (ann, other):
        await act(database, each, EVENTS)
    await audit_log.seal()
    await sign_all(checkpointer)
    await tampered(urls.owner, ann, *THOROUGH[name])
    lying = Acting(users, ann, without_a_finding)
    assert place_of(await client.verify(lying)) == 1  # type: ignore[arg-type]


async def test_what_was_seen_once_cannot_be_rewritten_even_by_who_removes_all_checkpoints(
    users: Users,
    urls: Urls,
    database: Database,
    ann: Caller,
    audit_log: AuditLog,
    checkpointer: Checkpointer,
    blobs: Blobs,
) -> None:
    await act(database, ann, EVENTS)
    await audit_log.seal()
    unsigned = await seen(users, ann)
    await sign_all(checkpointer)
    signed = await seen(users, ann)
    await blobs.erase(checkpoints.object_key(ann.tenant_id, EVENTS))
    await tampered(urls.owner, ann, *THOROUGH["edit"], forget_checkpoint)
    assert (await seen(users, ann)).broken is None, "nobody who never looked could tell"
    assert place_of(await seen(users, ann, last=unsigned.receipt)) == 1
    found = (await seen(users, ann, last=signed.receipt)).broken
    assert found
    assert "now there are none" in found.problem


async def forget_checkpoint(connection: Any, caller: Caller) -> None:
    await connection.execute("DELETE FROM audit_checkpoints WHERE tenant_id = $1", caller.tenant_id)


async def test_a_checkpoint_must_be_signed_by_a_key_that_is_trusted(
    users: Users,
    database: Database,
    ann: Caller,
    audit_log: AuditLog,
    audit_keys: AuditKeys,
    checkpointer: Checkpointer,
    clock: FakeClock,
) -> None:
    await act(database, ann, EVENTS)
    await audit_log.seal()
    await sign_all(checkpointer)
    first = await seen(users, ann)
    (trusted,) = first.receipt.key_ids
    assert (await seen(users, ann, trusted=[trusted])).broken is None
    assert place_of(await seen(users, ann, trusted=["another"])) == EVENTS
    clock.advance(days=1)
    rotated = await audit_keys.rotate()
    await act(database, ann, 1)
    await audit_log.seal()
    await sign_all(checkpointer)
    later = await seen(users, ann, last=first.receipt)
    assert (later.broken, later.new_key_ids) == (None, (rotated,))


async def test_a_signature_of_nobody_is_no_signature(
    users: Users, database: Database, ann: Caller, audit_log: AuditLog, checkpointer: Checkpointer
) -> None:
    await act(database, ann, EVENTS)
    await audit_log.seal()
    await sign_all(checkpointer)

    def strip(answer: Any) -> Any:
        if isinstance(answer, pb.VerifyAuditLogResponse):
            header = "eyJhbGciOiJub25lIn0"
            answer.checkpoints[0].signed = f"{header}.{answer.checkpoints[0].signed.split('.')[1]}."
        return answer

    lying = Acting(users, ann, strip)
    assert place_of(await client.verify(lying)) == EVENTS  # type: ignore[arg-type]


async def test_events_of_other_users_of_the_tenant_are_withheld_and_counted(
    users: Users,
    database: Database,
    system_database: SystemDatabase,
    ann: Caller,
    audit_log: AuditLog,
) -> None:
    bob = Caller(tenant_id=ann.tenant_id, user_id=ids.new_id())
    await new_user(system_database, bob)
    await act(database, ann, 3)
    await act(database, bob, 2, first=100)
    await act(database, ann, 3, first=3)
    await audit_log.seal()
    for caller, own, others in ((ann, 6, 2), (bob, 2, 6)):
        links = (
            await users.ListAuditLinks(pb.ListAuditLinksRequest(), metadata=bearer(caller))
        ).links
        shown = [link for link in links if link.HasField("event")]
        assert {link.user_id for link in shown} == {ids.show(ids.USER, caller.user_id)}
        assert (len(shown), sum(link.withheld for link in links)) == (own, others)
        report = await seen(users, caller)
        assert (report.broken, report.withheld, report.receipt.position) == (None, others, 8)


async def test_links_are_listed_in_pages_and_tokens_fit_one_user(
    users: Users, database: Database, ann: Caller, audit_log: AuditLog
) -> None:
    await act(database, ann, EVENTS)
    await audit_log.seal()
    for size in (1, 7, 19, 20, 21):
        request, places = pb.ListAuditLinksRequest(page_size=size), []
        while True:
            page = await users.ListAuditLinks(request, metadata=bearer(ann))
            places += [link.position for link in page.links]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert places == list(range(1, EVENTS + 1))
    request.page_size = 1
    request.page_token = ""
    request.page_token = (await users.ListAuditLinks(request, metadata=bearer(ann))).next_page_token
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await users.ListAuditLinks(request, metadata=bearer(await new_caller(database)))


# --- the command -------------------------------------------------------------------------------


Open = Callable[[AuditLog], Any]


@pytest_asyncio.fixture
async def open_command(
    serve: Serve,
    database: Database,
    system_database: SystemDatabase,
    consents: ConsentStore,
    withdrawals: WithdrawalArchive,
    tmp_path: Path,
) -> Open:
    """Serve an audit log behind TLS, as the edge would."""

    async def start(audit_log: AuditLog) -> Command:
        service = UserService(
            UserStore(database), consents, withdrawals, TenantAudits(system_database), audit_log
        )
        return await command_of(
            serve, tmp_path, lambda server: rpc.add_UserServiceServicer_to_server(service, server)
        )

    return start


async def test_the_command_ends_with_0_intact_and_1_broken(
    open_command: Open,
    urls: Urls,
    database: Database,
    ann: Caller,
    audit_log: AuditLog,
    checkpointer: Checkpointer,
) -> None:
    kimberly = await open_command(audit_log)
    await act(database, ann, EVENTS)
    await audit_log.seal()
    young = await kimberly("audit", "verify", token=token_of(ann))
    assert (young.status, young.error) == (0, "")
    assert "none to compare with" in young.output
    await sign_all(checkpointer)
    intact = await kimberly("audit", "verify", token=token_of(ann))
    assert (intact.status, intact.error) == (0, "")
    assert f"{EVENTS}, computed anew here" in intact.output
    assert f"position {EVENTS}; 0 events came later" in intact.output
    assert intact.output.rstrip().endswith("intact")
    await tampered(urls.owner, ann, *CARELESS["edit"])
    broken = await kimberly("audit", "verify", token=token_of(ann))
    assert broken.status == 1
    assert (
        "BROKEN at position 8: the event of this place, or its link, was changed" in broken.output
    )


async def test_the_command_remembers_what_it_saw(
    open_command: Open,
    urls: Urls,
    database: Database,
    ann: Caller,
    audit_log: AuditLog,
    tmp_path: Path,
) -> None:
    kimberly = await open_command(audit_log)
    await act(database, ann, EVENTS)
    receipts = str(tmp_path / "seen")
    verify = ("audit", "verify", "--receipts", receipts)
    assert (await kimberly(*verify, token=token_of(ann))).status == 0
    (receipt,) = (tmp_path / "seen").iterdir()
    kept = json.loads(receipt.read_text())
    assert kept["position"] == EVENTS
    await tampered(urls.owner, ann, *THOROUGH["edit"])
    broken = await kimberly(*verify, token=token_of(ann))
    assert broken.status == 1
    assert f"at position {EVENTS} it contradicts what was seen the last time" in broken.output
    assert json.loads(receipt.read_text()) == kept, "a broken log leaves no receipt"
    receipt.write_text("{")
    damaged = await kimberly(*verify, token=token_of(ann))
    assert damaged.status == 2
    assert str(receipt) in damaged.error


async def test_the_command_ends_with_2_when_it_cannot_tell(
    open_command: Open,
    database: Database,
    system_database: SystemDatabase,
    ann: Caller,
    audit_log: AuditLog,
    checkpointer: Checkpointer,
    checkpoint_store: CheckpointStore,
    audit_keys: AuditKeys,
    tmp_path: Path,
) -> None:
    await act(database, ann, EVENTS)
    await audit_log.seal()
    await sign_all(checkpointer)
    nowhere = Blobs.open(
        endpoint="127.0.0.1:1",
        access_key="a",
        secret_key="s",
        region="us-east-1",
        secure=False,
        bucket="kimberly",
    )
    away = CheckpointArchive(nowhere, checkpoint_store, audit_keys)
    blind = AuditLog(AuditStore(system_database), away, seal_seconds=1)
    kimberly = await open_command(blind)
    receipts = tmp_path / "seen"
    unread = await kimberly("audit", "verify", token=token_of(ann), KIMBERLY_RECEIPTS=str(receipts))
    assert unread.status == 2
    assert "could not tell" in unread.output
    assert not receipts.exists()
    for ended, why in (
        (await kimberly("audit", "verify", token=""), "KIMBERLY_TOKEN"),
        (await kimberly("audit", "verify", token="nonsense"), "TOKEN_INVALID"),
        (await kimberly("audit", "verify", "--ca", "/missing", token="x"), "does not exist"),
        (
            await kimberly("audit", "events", "--address", "localhost:1", token="x"),
            "localhost:1",
        ),
    ):
        assert ended.status == 2, ended
        assert why in ended.error
        assert "Traceback" not in ended.error
        assert "nonsense" not in ended.error


async def test_the_command_lists_events_newest_first(
    open_command: Open, database: Database, ann: Caller, audit_log: AuditLog, tmp_path: Path
) -> None:
    kimberly = await open_command(audit_log)
    await act(database, ann, EVENTS)
    await audit_log.seal()
    (tmp_path / "token").write_text(token_of(ann) + "\n")
    listing = ("audit", "events", "--limit", "3", "--token-file", str(tmp_path / "token"))
    table = await kimberly(*listing, token="")
    assert table.status == 0
    assert [f"mem_{number}" in table.output for number in (19, 18, 17, 16)] == [
        True,
        True,
        True,
        False,
    ]
    lines = (await kimberly(*listing, "--json", token="")).output.splitlines()
    assert [json.loads(line)["resource"] for line in lines] == ["mem_19", "mem_18", "mem_17"]
    everything = await kimberly("audit", "events", "--limit", "5000", "--json", token=token_of(ann))
    assert len(everything.output.splitlines()) == EVENTS


def test_help_says_what_each_command_does_and_how_it_ends() -> None:
    runner = CliRunner(env={"COLUMNS": "120"})
    top = runner.invoke(app, ["--help"])
    assert top.exit_code == 0
    assert "audit" in top.output
    verify = runner.invoke(app, ["audit", "verify", "--help"])
    for part in ("0 intact, 1 broken, 2 could not tell", "--receipts", "KIMBERLY_TOKEN", "--key"):
        assert part in verify.output
    assert runner.invoke(app, ["audit", "verify", "--nonsense"]).exit_code == 2
