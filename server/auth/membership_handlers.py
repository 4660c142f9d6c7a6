"""What AuthService answers about the tenants that an account belongs to."""

from typing import Any, TypeAlias
from uuid import UUID

import grpc
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids, requests
from server.auth import clients, refresh_tokens
from server.auth.issuing import Issuer
from server.auth.members import Membership
from server.auth.membership_store import MembershipStore
from server.auth.messages import role_to, timestamp
from server.auth.metrics import TOKENS
from server.auth.password_handlers import PasswordHandlers
from server.caller import current_caller, current_credentials
from server.errors import ProofInvalid

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class MembershipHandlers(PasswordHandlers):
    """A part of AuthService."""

    _memberships: MembershipStore
    _issuer: Issuer

    async def AcceptInvitation(
        self, request: pb.AcceptInvitationRequest, context: Context
    ) -> pb.AcceptInvitationResponse:
        caller = current_caller()
        joined = await self._memberships.accept(caller, request.invitation, self._clock())
        return pb.AcceptInvitationResponse(membership=_membership_to(joined, caller.tenant_id))

    async def ListTenants(
        self, request: pb.ListTenantsRequest, context: Context
    ) -> pb.ListTenantsResponse:
        caller = current_caller()
        memberships = await self._memberships.list_all(caller)
        return pb.ListTenantsResponse(
            memberships=(_membership_to(each, caller.tenant_id) for each in memberships)
        )

    async def SwitchTenant(
        self, request: pb.SwitchTenantRequest, context: Context
    ) -> pb.SwitchTenantResponse:
        """Start a session in another tenant of the account."""
        tenant_id = ids.parse(ids.TENANT, request.tenant_id, "tenant_id")
        await self._issuer.check()
        token = refresh_tokens.new_token()
        session = await self._memberships.switch(
            current_credentials(),
            tenant_id,
            refresh_tokens.hash_of(token),
            clients.name_of(context),
            self._clock(),
        )
        TOKENS.labels("switch").inc()
        return pb.SwitchTenantResponse(
            tokens=await self._issuer.tokens(session, token),
            user_id=ids.show(ids.USER, session.caller.user_id),
        )

    async def LeaveTenant(
        self, request: pb.LeaveTenantRequest, context: Context
    ) -> pb.LeaveTenantResponse:
        """Leave a tenant, if it is the user who asks."""
        requests.check_request_id(request.request_id)
        caller = current_caller()
        tenant_id = ids.parse(ids.TENANT, request.tenant_id, "tenant_id")
        # Asked again by who is gone there, nothing is done that needs a proof.
        receipt_id = await self._memberships.left(caller, tenant_id)
        if receipt_id is None:
            if not await self.proves(await self._accounts.get(caller), request.password):
                raise ProofInvalid
            receipt_id = await self._memberships.leave(caller, tenant_id, request.request_id)
        return pb.LeaveTenantResponse(receipt_id=ids.show(ids.RECEIPT, receipt_id))


def _membership_to(membership: Membership, current: UUID) -> pb.Membership:
    caller, disabled_at = membership.caller, membership.disabled_at
    return pb.Membership(
        tenant_id=ids.show(ids.TENANT, caller.tenant_id),
        user_id=ids.show(ids.USER, caller.user_id),
        role=role_to(membership.role),
        join_time=timestamp(membership.joined_at),
        home=membership.is_home,
        current=caller.tenant_id == current,
        disable_time=timestamp(disabled_at) if disabled_at else None,
    )
