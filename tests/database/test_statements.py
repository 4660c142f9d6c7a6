"""The first wall: a statement about what belongs to users says whose it is about.

A statement passes that names both `tenant_id` and `user_id`, wherever it does. What the second
wall catches when one of them is wrong is shown in test_every_table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.database.rows import TENANT_TABLES
from tests.database.statements import Statement, statements

NAMES: Final = ("tenant_id", "user_id")
QUEUE: Final = "system role: workers take jobs of everybody, and a lease token says which"
CHAIN: Final = "system role: the chain is the tenant's; its rows have no user"
TENANT: Final = "system role: all of one tenant, for those who run it"
ACCOUNT: Final = "system role: the users of one account, in whichever of its tenants"
ONE: Final = "system role: one user, whose tenant does not matter"
RUN: Final = "system role: a run is of one user or of all, and its id or fence says which"
ALL: Final = "system role: counts for Prometheus, of everybody together"
BACKUP: Final = "backups are of everybody: made and restored by roles that no caller reaches"
SESSION: Final = "system role: the session was found by its token, before anybody is known"

ELSEWHERE: Final[Mapping[str, str]] = {
    "auth.api_key_store._take_turns": "the user's id is the column id",
    "auth.api_key_store.forget": "system role: what is old goes, whose it ever was",
    "auth.mail_store._address_invitation": "system role: the mail names the invitation",
    "auth.member_store.-": "a part of a statement: a member, and the home of their account",
    "auth.member_store._changeable": "the user's id is the column id",
    "auth.member_store._check_may_ask": TENANT,
    "auth.member_store._forget_expired": TENANT,
    "auth.member_store._update": "the user's id is the column id",
    "auth.member_store.forget": "system role: what is old goes, whose it ever was",
    "auth.member_store.list_members": TENANT,
    "auth.member_store.revoke_invitation": TENANT,
    "auth.mail_store._forget_tokens": ONE,
    "auth.mail_store.forget": "system role: what is old goes, whose it ever was",
    "auth.mail_store.is_living": "system role: whoever has the token may ask about it",
    "auth.membership_store._check_room": ACCOUNT,
    "auth.membership_store._close": "system role: whoever has the token joins",
    "auth.membership_store._home": "the user's id is the column id",
    "auth.membership_store._join": "the user's id is the column id",
    "auth.membership_store._lock": "the user's id is the column id",
    "auth.membership_store._memberships": ACCOUNT,
    "auth.session_store._count_repeat": SESSION,
    "auth.session_store._end_with_others": SESSION,
    "auth.session_store._make_room": ACCOUNT,
    "auth.session_store._mark_used": SESSION,
    "auth.session_store.begin": ONE,
    "auth.session_store._lock_all": ACCOUNT,
    "auth.session_store.lock_enabled": "the user's id is the column id",
    "auth.session_store.revoke": ACCOUNT,
    "auth.store._accept": "system role: whoever has the token joins",
    "auth.store.invited": "system role: whoever has the token may ask about it",
    "auth.store._insert_user": "the user's id is the column id",
    "auth.store.mark_verified": "the user's id is the column id",
    "auth.store.one_hash_of_each_cost": "system role: what hashes cost, whosever they are",
    "auth.store.replace_hash": ONE,
    "roles.check_role": "the user's id is the column id",
    "grants._ended_within": "system role: what ended is refused, whose it ever was",
    "grants.forget": "system role: what is old goes, whose it ever was",
    "erased.refresh": "system role: whose tokens open nothing, whoever shows one",
    "privacy.erasing._condition": "a part of a statement: a user by the email that they have",
    "privacy.erasure_store._part": "the user's id is the column id",
    "privacy.erasure_store.password_hash": ACCOUNT,
    "privacy.erasure_store.note_archived": "system role: one erasure, by its id",
    "backup.restoring.-": BACKUP,
    "backup.snapshot.checkpoints": BACKUP,
    "backup.snapshot.nearest": ONE,
    "backup.snapshot.nearest_by_graph": BACKUP,
    "backup.snapshot.probes": BACKUP,
    "processes.backups._check_logs": BACKUP,
    "privacy.erasure_store._tenants_of": ACCOUNT,
    "enqueue._unfinished": "a unique key says whose job it is",
    "jobs.queue.-": QUEUE,
    "jobs.queue._complete": QUEUE,
    "jobs.queue._told_before": QUEUE,
    "jobs.queue._fail": QUEUE,
    "jobs.queue._stop": QUEUE,
    "jobs.queue.admit": QUEUE,
    "jobs.queue.extend": QUEUE,
    "jobs.queue.forget": "system role: what is old goes, whosever it was",
    "jobs.queue.reclaim": QUEUE,
    "jobs.queue._release": QUEUE,
    "jobs.metrics.standing": ALL,
    "jobs.metrics.waiting": ALL,
    "jobs.store.some": "system role: jobs that were shown to their users when a watch began",
    "memory.embedding_jobs._release": "the lease token of a job stands for its user",
    "memory.embedding_jobs.hold": "the lease token of a job stands for its user",
    "memory.key_rotation._store": "system role: keys are wrapped anew by their ids",
    "memory.metrics.interrupted": ALL,
    "memory.metrics.meditations": ALL,
    "memory.metrics.vectors": ALL,
    "memory.promotion_rounds._forget_exits": "system role: what is old goes, whose it ever was",
    "memory.retention_store.delete_due": "system role: what is due, chosen by user and id",
    "memory.retention_store.forget_requests": "system role: what is old goes, whose it ever was",
    "memory.retrieval_counts._write": "system role: counts of many users, by user and id",
    "memory.scoring_store._insert": RUN,
    "memory.score_batches._bodies": "system role: texts of a shard, chosen by user and id",
    "memory.scoring_store.finish": RUN,
    "memory.scoring_store.plan_all": RUN,
    "memory.tidying.-": "a part of a statement: scores, of memories that are a user's",
    "memory.sweeping._named": "system role: uploads by the names that the object store knows",
    "memory.sweeping.doomed": "system role: objects of everybody, in the order of their keys",
    "users.audit_store._heads": CHAIN,
    "users.audit_store._insert_links": CHAIN,
    "users.audit_store._move_heads": CHAIN,
    "users.audit_store.end": CHAIN,
    "users.audit_store.find_inserted": CHAIN,
    "users.checkpoint_store.hashes": CHAIN,
    "users.checkpoint_store.moved": CHAIN,
    "users.checkpoint_store.record": CHAIN,
    "users.checkpoint_store.recorded": CHAIN,
    "users.metrics.lag": ALL,
    "users.metrics.unsigned": ALL,
    "users.store.get": "the user's id is the column id",
    "users.store.rename": "the user's id is the column id",
}
"""Functions whose statements do not name both, and why they need not."""


def names_both(statement: Statement) -> bool:
    return all(name in statement.text for name in NAMES)


def test_every_statement_names_tenant_and_user_or_has_a_reason_not_to() -> None:
    found = list(statements(TENANT_TABLES))
    assert {table for each in found for table in each.tables} == set(TENANT_TABLES)
    assert {each.place for each in found if not names_both(each)} == ELSEWHERE.keys()
