"""Serves kimberly.users.v1.UserService."""

from datetime import datetime
from typing import Any, Final

import grpc
from google.protobuf import timestamp_pb2
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc

from server import consent, ids, paging
from server.caller import current_caller
from server.errors import InvalidArgument
from server.users.audit_log import AuditLog, Verification
from server.users.settings_messages import change_from, settings_to
from server.users.store import AuditEvent, Consent, User, UserStore

Context = grpc.aio.ServicerContext[Any, Any]

_PURPOSES: Final = {
    pb.CONSENT_PURPOSE_MEMORY_STORE: consent.MEMORY_STORE,
    pb.CONSENT_PURPOSE_MEMORY_EMBED: consent.MEMORY_EMBED,
}
_ENUM_VALUES: Final = {purpose: value for value, purpose in _PURPOSES.items()}
_EVENT_LIST: Final = "audit events"


class UserService(rpc.UserServiceServicer):
    """Serves the signed-in user's own account."""

    def __init__(self, store: UserStore, audit_log: AuditLog) -> None:
        self._store = store
        self._audit_log = audit_log

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> pb.GetUserResponse:
        """Return the signed-in user."""
        user = await self._store.get(current_caller())
        return pb.GetUserResponse(user=_user(user))

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
        recorded = await self._store.record_consent(
            current_caller(), purpose, granted=request.granted
        )
        return pb.RecordConsentResponse(consent=_consent(recorded))

    async def ListConsents(
        self, request: pb.ListConsentsRequest, context: Context
    ) -> pb.ListConsentsResponse:
        """Return where each consent stands."""
        consents = await self._store.list_consents(current_caller())
        return pb.ListConsentsResponse(consents=map(_consent, consents))

    async def ListAuditEvents(
        self, request: pb.ListAuditEventsRequest, context: Context
    ) -> pb.ListAuditEventsResponse:
        """Return a page of the user's audit events, newest first."""
        caller = current_caller()
        size = paging.page_size(request.page_size)
        before = paging.decode(request.page_token, _EVENT_LIST, caller.user_id)
        events = await self._store.list_audit_events(caller, before=before, limit=size + 1)
        page = events[:size]
        has_more = len(events) > size
        return pb.ListAuditEventsResponse(
            events=map(_audit_event, page),
            next_page_token=(
                paging.encode(page[-1].id, _EVENT_LIST, caller.user_id) if has_more else ""
            ),
        )

    async def VerifyAuditLog(
        self, request: pb.VerifyAuditLogRequest, context: Context
    ) -> pb.VerifyAuditLogResponse:
        """Compute the hash chain of the caller's tenant anew."""
        return _verification(await self._audit_log.verify(current_caller().tenant_id))


def _user(user: User) -> pb.User:
    return pb.User(
        id=ids.show(ids.USER, user.id),
        tenant_id=ids.show(ids.TENANT, user.tenant_id),
        email=user.email,
        display_name=user.display_name,
        create_time=_timestamp(user.created_at),
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
    )


def _verification(found: Verification) -> pb.VerifyAuditLogResponse:
    return pb.VerifyAuditLogResponse(
        intact=found.broken is None,
        verified_events=found.verified_events,
        head_hash=found.head_hash.hex() if found.head_hash else "",
        first_broken_position=found.broken.position if found.broken else None,
        problem=found.broken.problem if found.broken else "",
    )


def _timestamp(instant: datetime) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromDatetime(instant)
    return timestamp
