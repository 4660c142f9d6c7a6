"""Serves kimberly.users.v1.UserService."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

import grpc
from google.protobuf import timestamp_pb2
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc

from server import consent, etags, ids, paging
from server.caller import Caller, current_caller, current_credentials
from server.display_names import check_display_name
from server.errors import InvalidArgument
from server.users.audit_keys import public_jwk
from server.users.audit_log import AuditLog, Verification
from server.users.chain import StoredLink
from server.users.checkpoint_archive import Comparison, Testimony
from server.users.checkpoints import Checkpoint
from server.users.consent_store import Consent, ConsentStore
from server.users.settings_messages import change_from, settings_to
from server.users.store import AuditEvent, User, UserStore
from server.users.tenant_audits import TenantAudits
from server.users.withdrawal_archive import WithdrawalArchive
from server.users.withdrawals import Withdrawal

Context = grpc.aio.ServicerContext[Any, Any]

_PURPOSES: Final = {
    pb.CONSENT_PURPOSE_MEMORY_STORE: consent.MEMORY_STORE,
    pb.CONSENT_PURPOSE_MEMORY_EMBED: consent.MEMORY_EMBED,
    pb.CONSENT_PURPOSE_MEMORY_SENSITIVE: consent.MEMORY_SENSITIVE,
    pb.CONSENT_PURPOSE_MEMORY_AGENT_ACCESS: consent.MEMORY_AGENT_ACCESS,
}
_ENUM_VALUES: Final = {purpose: value for value, purpose in _PURPOSES.items()}
_CHANGEABLE: Final = "display_name"
_EVENT_LIST: Final = "audit events"
_EVERYBODY: Final = "-"
_LINK_LIST: Final = "audit links"
_COMPARISONS: Final = {
    Comparison.NONE: pb.CHECKPOINT_COMPARISON_NONE,
    Comparison.COMPARED: pb.CHECKPOINT_COMPARISON_COMPARED,
    Comparison.UNREACHABLE: pb.CHECKPOINT_COMPARISON_UNREACHABLE,
}


class UserService(rpc.UserServiceServicer):
    """Serves the signed-in user's own account."""

    def __init__(
        self,
        store: UserStore,
        consents: ConsentStore,
        withdrawals: WithdrawalArchive,
        audits: TenantAudits,
        audit_log: AuditLog,
    ) -> None:
        self._store = store
        self._consents = consents
        self._withdrawals = withdrawals
        self._audits = audits
        self._audit_log = audit_log

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> pb.GetUserResponse:
        """Return the signed-in user."""
        user = await self._store.get(current_caller())
        return pb.GetUserResponse(user=_user(user))

    async def UpdateUser(
        self, request: pb.UpdateUserRequest, context: Context
    ) -> pb.UpdateUserResponse:
        """Change what the user chose about themselves."""
        if set(request.update_mask.paths) != {_CHANGEABLE}:
            raise InvalidArgument("update_mask", f"must name {_CHANGEABLE}, and nothing else")
        display_name = check_display_name(request.user.display_name, f"user.{_CHANGEABLE}")
        version = etags.parse(request.user.etag)
        user = await self._store.rename(current_caller(), display_name, version)
        return pb.UpdateUserResponse(user=_user(user))

    async def GetSettings(
        self, request: pb.GetSettingsRequest, context: Context
    ) -> pb.GetSettingsResponse:
        """Return the user's settings."""
        chosen = await self._store.settings(current_caller())
        return pb.GetSettingsResponse(settings=settings_to(chosen))

    async def UpdateSettings(
        self, request: pb.UpdateSettingsRequest, context: Context
    ) -> pb.UpdateSettingsResponse:
        """Change some of the user's settings."""
        changed = await self._store.update_settings(current_caller(), change_from(request))
        return pb.UpdateSettingsResponse(settings=settings_to(changed))

    async def RecordConsent(
        self, request: pb.RecordConsentRequest, context: Context
    ) -> pb.RecordConsentResponse:
        """Grant or withdraw consent to a purpose."""
        purpose = _PURPOSES.get(request.purpose)
        if purpose is None:
            raise InvalidArgument("purpose", "must be one of the named purposes")
        credentials = current_credentials()
        caller = credentials.caller
        recorded = await self._consents.record(
            caller, purpose, granted=request.granted, session_id=credentials.grant_id
        )
        made = recorded.consent
        if not made.granted:
            await self._withdrawals.put(Withdrawal(caller, purpose, made.version, made.recorded_at))
        return pb.RecordConsentResponse(
            consent=_consent(made), ended_sessions=recorded.ended_sessions
        )

    async def ListConsents(
        self, request: pb.ListConsentsRequest, context: Context
    ) -> pb.ListConsentsResponse:
        """Return where each consent stands."""
        consents = await self._store.list_consents(
            current_caller(), with_history=request.include_history
        )
        return pb.ListConsentsResponse(consents=map(_consent, consents))

    async def ListAuditEvents(
        self, request: pb.ListAuditEventsRequest, context: Context
    ) -> pb.ListAuditEventsResponse:
        """Return a page of audit events, newest first: the user's, or others' to auditors."""
        caller = current_caller()
        size = paging.page_size(request.page_size)
        identity = (_EVENT_LIST, caller.user_id, request.user_id)
        before = paging.decode(request.page_token, *identity)
        if request.user_id:
            whose = _whose(request.user_id)
            events = await self._audits.events(caller, whose, before=before, limit=size + 1)
        else:
            events = await self._store.list_audit_events(caller, before=before, limit=size + 1)
        page = events[:size]
        has_more = len(events) > size
        return pb.ListAuditEventsResponse(
            events=map(_audit_event, page),
            next_page_token=(paging.encode(page[-1].id, *identity) if has_more else ""),
        )

    async def ListAuditLinks(
        self, request: pb.ListAuditLinksRequest, context: Context
    ) -> pb.ListAuditLinksResponse:
        """Return a page of the tenant's hash chain."""
        caller = current_caller()
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, _LINK_LIST, caller.user_id)
        links = await self._audit_log.links(
            caller.tenant_id, after=after.int if after else 0, limit=size + 1
        )
        page = links[:size]
        # The token holds a place where others hold an id: both have their order.
        last = UUID(int=page[-1].position) if len(links) > size else None
        return pb.ListAuditLinksResponse(
            links=(_audit_link(link, caller) for link in page),
            next_page_token=paging.encode(last, _LINK_LIST, caller.user_id) if last else "",
        )

    async def VerifyAuditLog(
        self, request: pb.VerifyAuditLogRequest, context: Context
    ) -> pb.VerifyAuditLogResponse:
        """Compute the hash chain of the caller's tenant anew."""
        return _verification(await self._audit_log.verify(current_caller().tenant_id))


def _whose(asked: str) -> UUID | None:
    """Return whose events are asked for; None: everybody's of the tenant."""
    return None if asked == _EVERYBODY else ids.parse(ids.USER, asked, "user_id")


def _user(user: User) -> pb.User:
    return pb.User(
        id=ids.show(ids.USER, user.id),
        tenant_id=ids.show(ids.TENANT, user.tenant_id),
        email=user.email,
        display_name=user.display_name,
        create_time=_timestamp(user.created_at),
        etag=etags.show(user.version),
    )


def _consent(recorded: Consent) -> pb.Consent:
    return pb.Consent(
        purpose=_ENUM_VALUES[recorded.purpose],
        granted=recorded.granted,
        version=recorded.version,
        record_time=_timestamp(recorded.recorded_at),
    )


def _audit_event(event: AuditEvent) -> pb.AuditEvent:
    return pb.AuditEvent(
        id=ids.show(ids.AUDIT_EVENT, event.id),
        event_time=_timestamp(event.event_time),
        actor=event.actor,
        action=event.action,
        resource=event.resource,
        chain_position=event.chain_position,
        user_id=ids.show(ids.USER, event.user_id),
        agent_name=event.agent_name or "",
    )


def _audit_link(link: StoredLink, reader: Caller) -> pb.AuditLink:
    shown = pb.AuditLink(position=link.position, hash=link.hash.hex())
    event = link.event
    # An event that was moved to another tenant is not withheld from this one: it is gone.
    if event is None or event.tenant_id != reader.tenant_id:
        return shown
    if event.user_id != reader.user_id:
        shown.withheld = True
        return shown
    shown.event.CopyFrom(
        _audit_event(
            AuditEvent(
                id=event.id,
                event_time=event.event_time,
                actor=event.actor,
                action=event.action,
                resource=event.resource,
                user_id=event.user_id,
                chain_position=link.position,
            )
        )
    )
    shown.user_id = ids.show(ids.USER, event.user_id)
    shown.transaction = event.xid
    return shown


def _verification(found: Verification) -> pb.VerifyAuditLogResponse:
    testimony = found.testimony
    return pb.VerifyAuditLogResponse(
        intact=found.broken is None,
        verified_events=found.verified_events,
        head_hash=found.head_hash.hex() if found.head_hash else "",
        first_broken_position=found.broken.position if found.broken else None,
        problem=found.broken.problem if found.broken else "",
        checkpoint_comparison=_COMPARISONS[testimony.comparison],
        newest_checkpoint=_newest_checkpoint(testimony),
        checkpoints=map(_checkpoint, testimony.checkpoints),
        keys=(
            pb.AuditKey(key_id=key_id, public_jwk=public_jwk(key))
            for key_id, key in testimony.keys.items()
        ),
    )


def _newest_checkpoint(testimony: Testimony) -> pb.AuditCheckpoint | None:
    if testimony.checkpoints:
        return _checkpoint(testimony.checkpoints[-1])
    recorded = testimony.recorded
    if recorded is None:
        return None
    return pb.AuditCheckpoint(
        position=recorded.position,
        key_id=recorded.key_id,
        sign_time=_timestamp(recorded.signed_at),
    )


def _checkpoint(checkpoint: Checkpoint) -> pb.AuditCheckpoint:
    return pb.AuditCheckpoint(
        position=checkpoint.position,
        hash=checkpoint.hash.hex(),
        sign_time=_timestamp(checkpoint.signed_at),
        key_id=checkpoint.key_id,
        signed=checkpoint.token,
    )


def _timestamp(instant: datetime) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromDatetime(instant)
    return timestamp
