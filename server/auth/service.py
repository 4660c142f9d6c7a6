"""Serves kimberly.auth.v1.AuthService."""

from collections.abc import Mapping
from typing import Any, TypeAlias
from uuid import UUID

import grpc
from joserfc.jwk import ECKey
from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from server import ids
from server.access import Role
from server.auth import clients, emails
from server.auth.api_key_handlers import ApiKeyHandlers
from server.auth.api_key_store import ApiKeyStore
from server.auth.attempt_store import AttemptStore
from server.auth.issuing import Issuer
from server.auth.keyring import Keyring
from server.auth.mail_store import MailStore
from server.auth.membership_handlers import MembershipHandlers
from server.auth.membership_store import MembershipStore
from server.auth.metrics import LOG_INS, TOKENS
from server.auth.oauth_handlers import OAuthHandlers
from server.auth.passwords import Passwords
from server.auth.session_store import SessionStore
from server.auth.sign_up_store import SignUp, SignUpStore
from server.auth.store import Account, AccountStore, NewUser
from server.caller import Caller
from server.clock import Clock, utc_now
from server.display_names import check_display_name
from server.errors import CredentialsInvalid, MailsNotSent, StoreUnavailable
from server.places import current_place

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AuthService(OAuthHandlers, ApiKeyHandlers, MembershipHandlers, rpc.AuthServiceServicer):
    """Signs people up and in, and issues the tokens that every other service verifies."""

    def __init__(
        self,
        accounts: AccountStore,
        sessions: SessionStore,
        attempts: AttemptStore,
        mails: MailStore,
        api_keys: ApiKeyStore,
        memberships: MembershipStore,
        keyring: Keyring,
        hashing: Passwords,
        issuer: Issuer,
        *,
        sign_ups: SignUpStore,
        confirms_email: bool = True,
        sends_mails: bool = True,
        clock: Clock = utc_now,
    ) -> None:
        """Prepare to serve.

        Without `confirms_email`, whoever signs up is told whether the email names an account, and
        acts as its user before it is known to be theirs. Without `sends_mails`, nobody is told that
        a mail will come by which an account is made.
        """
        self._accounts = accounts
        self._sessions = sessions
        self._attempts = attempts
        self._mails = mails
        self._api_keys = api_keys
        self._memberships = memberships
        self._keyring = keyring
        self._hashing = hashing
        self._issuer = issuer
        self._sign_ups = sign_ups
        self._confirms_email = confirms_email
        self._sends_mails = sends_mails
        self._clock = clock

    async def SignUp(self, request: pb.SignUpRequest, context: Context) -> pb.SignUpResponse:
        """Create a user in a tenant of their own and start a session, or have a mail ask first."""
        is_asked_first = self._confirms_email and not request.invitation
        if is_asked_first and not self._sends_mails:
            raise MailsNotSent
        email = emails.normalize(request.email, "email")
        asked = request.display_name.strip() or email.partition("@")[0]
        display_name = check_display_name(asked, "display_name")
        names = [email, email.partition("@")[0], display_name]
        await self._hashing.check_new(request.password, "password", names=names)
        tenant_id, role = await self._place(request.invitation, email)
        caller = Caller(tenant_id=tenant_id, user_id=ids.new_id())
        password_hash = await self._hashing.hash(request.password)
        if is_asked_first:
            sign_up = SignUp(ids.new_id(), email, display_name, password_hash)
            await self._sign_ups.ask(sign_up, self._clock())
            return pb.SignUpResponse()
        user = NewUser(caller, email, display_name, password_hash, role, request.invitation)
        new = self._issuer.begin(caller, role, clients.name_of(context))
        tokens = await self._issuer.tokens(new.session, new.refresh_token)
        await self._accounts.sign_up(user, new.session, new.token_hash, self._clock())
        TOKENS.labels("sign_up").inc()
        return pb.SignUpResponse(
            user_id=ids.show(ids.USER, caller.user_id),
            tenant_id=ids.show(ids.TENANT, caller.tenant_id),
            tokens=tokens,
        )

    async def LogIn(self, request: pb.LogInRequest, context: Context) -> pb.LogInResponse:
        """Start a session.

        Whether the email is unknown, the password wrong or the account held up: the same
        statements are run, one hash is computed, and the same is said.
        """
        email, place = emails.normalize(request.email, "email"), current_place()
        is_allowed = await self._attempts.begin(email, place, self._clock())
        account = await self._accounts.find(email)
        stored = account.password_hash if account else None
        matches = await self._hashing.match(stored, request.password)
        if account is None or not matches or not is_allowed or account.is_disabled:
            LOG_INS.labels("refused" if is_allowed else "delayed").inc()
            raise CredentialsInvalid
        await self._attempts.succeed(email, place, self._clock())
        await self._renew_hash(account, request.password)
        new = self._issuer.begin(account.caller, account.role, clients.name_of(context))
        tokens = await self._issuer.tokens(new.session, new.refresh_token)
        await self._sessions.start(
            new.session,
            new.token_hash,
            self._clock(),
            password_changes=account.password_changes,
        )
        LOG_INS.labels("ok").inc()
        TOKENS.labels("password").inc()
        return pb.LogInResponse(tokens=tokens)

    async def GetJwks(self, request: pb.GetJwksRequest, context: Context) -> pb.GetJwksResponse:
        """Return the published keys."""
        if not self._keyring.keys:
            await self._keyring.refresh()
        if not self._keyring.keys:
            raise StoreUnavailable("the store of the signing keys")
        return pb.GetJwksResponse(keys=_to_proto(self._keyring.keys))

    async def _place(self, invitation: str, email: str) -> tuple[UUID, str]:
        """Return the tenant of a new user, and what they may do there."""
        if not invitation:
            return ids.new_id(), Role.OWNER
        return await self._accounts.invited(invitation, email, self._clock())

    async def _renew_hash(self, account: Account, password: str) -> None:
        if self._hashing.is_outdated(account.password_hash):
            renewed = await self._hashing.hash(password)
            await self._accounts.replace_hash(
                account.caller.user_id, account.password_hash, renewed
            )


def _to_proto(keys: Mapping[str, ECKey]) -> list[pb.JsonWebKey]:
    return [
        pb.JsonWebKey(**{name: str(value) for name, value in key.as_dict().items()})
        for key in keys.values()
    ]
