"""Serves kimberly.auth.v1.TenantService."""

from typing import Any, Final, TypeAlias

import grpc
from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from server import ids, paging
from server.access import Role
from server.auth import emails
from server.auth.member_store import MemberStore
from server.auth.members import Invitation, Member
from server.auth.messages import role_from, role_to, timestamp
from server.caller import current_caller
from server.clock import Clock, utc_now
from server.errors import InvalidArgument

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_MEMBER_LIST: Final = "members"


class TenantService(rpc.TenantServiceServicer):
    """Runs a tenant of several people."""

    def __init__(self, members: MemberStore, *, clock: Clock = utc_now) -> None:
        self._members = members
        self._clock = clock

    async def ListMembers(
        self, request: pb.ListMembersRequest, context: Context
    ) -> pb.ListMembersResponse:
        caller = current_caller()
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, _MEMBER_LIST, caller.user_id)
        members = await self._members.list_members(caller, after=after, limit=size + 1)
        page, has_more = members[:size], len(members) > size
        return pb.ListMembersResponse(
            members=map(_member_to, page),
            next_page_token=(
                paging.encode(page[-1].user_id, _MEMBER_LIST, caller.user_id) if has_more else ""
            ),
        )

    async def AssignRole(
        self, request: pb.AssignRoleRequest, context: Context
    ) -> pb.AssignRoleResponse:
        user_id = ids.parse(ids.USER, request.user_id, "user_id")
        role = role_from(request.role)
        member = await self._members.assign(current_caller(), user_id, role)
        return pb.AssignRoleResponse(member=_member_to(member))

    async def DisableMember(
        self, request: pb.DisableMemberRequest, context: Context
    ) -> pb.DisableMemberResponse:
        user_id = ids.parse(ids.USER, request.user_id, "user_id")
        member = await self._members.disable(current_caller(), user_id, self._clock())
        return pb.DisableMemberResponse(member=_member_to(member))

    async def EnableMember(
        self, request: pb.EnableMemberRequest, context: Context
    ) -> pb.EnableMemberResponse:
        user_id = ids.parse(ids.USER, request.user_id, "user_id")
        member = await self._members.enable(current_caller(), user_id)
        return pb.EnableMemberResponse(member=_member_to(member))

    async def RemoveMember(
        self, request: pb.RemoveMemberRequest, context: Context
    ) -> pb.RemoveMemberResponse:
        user_id = ids.parse(ids.USER, request.user_id, "user_id")
        receipt_id = await self._members.remove(current_caller(), user_id)
        return pb.RemoveMemberResponse(receipt_id=ids.show(ids.RECEIPT, receipt_id))

    async def LogOutMember(
        self, request: pb.LogOutMemberRequest, context: Context
    ) -> pb.LogOutMemberResponse:
        user_id = ids.parse(ids.USER, request.user_id, "user_id")
        ended, revoked = await self._members.log_out(
            current_caller(), user_id, self._clock(), with_keys=request.revoke_api_keys
        )
        return pb.LogOutMemberResponse(ended=ended, revoked_api_keys=revoked)

    async def CreateInvitation(
        self, request: pb.CreateInvitationRequest, context: Context
    ) -> pb.CreateInvitationResponse:
        email, role = emails.normalize(request.email, "email"), role_from(request.role)
        if role is Role.OWNER:
            raise InvalidArgument("role", "nobody is invited as an owner; assign it afterwards")
        invitation = await self._members.invite(current_caller(), email, role, self._clock())
        return pb.CreateInvitationResponse(invitation=_invitation_to(invitation))

    async def ListInvitations(
        self, request: pb.ListInvitationsRequest, context: Context
    ) -> pb.ListInvitationsResponse:
        invitations = await self._members.list_invitations(current_caller(), self._clock())
        return pb.ListInvitationsResponse(invitations=map(_invitation_to, invitations))

    async def RevokeInvitation(
        self, request: pb.RevokeInvitationRequest, context: Context
    ) -> pb.RevokeInvitationResponse:
        invitation_id = ids.parse(ids.INVITATION, request.id, "id")
        await self._members.revoke_invitation(current_caller(), invitation_id, self._clock())
        return pb.RevokeInvitationResponse()


def _member_to(member: Member) -> pb.Member:
    disabled_at = member.disabled_at
    return pb.Member(
        user_id=ids.show(ids.USER, member.user_id),
        email=member.email,
        display_name=member.display_name,
        role=role_to(member.role),
        join_time=timestamp(member.joined_at),
        email_verified=member.email_verified,
        disable_time=timestamp(disabled_at) if disabled_at else None,
        home=member.is_home,
    )


def _invitation_to(invitation: Invitation) -> pb.Invitation:
    return pb.Invitation(
        id=ids.show(ids.INVITATION, invitation.id),
        email=invitation.email,
        role=role_to(invitation.role),
        inviter_id=ids.show(ids.USER, invitation.inviter_id),
        create_time=timestamp(invitation.created_at),
        expire_time=timestamp(invitation.expires_at),
    )
