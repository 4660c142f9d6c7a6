"""What AuthService answers about passwords, and about emails that prove who somebody is."""

from typing import Any, TypeAlias

import grpc
from kimberly.auth.v1 import auth_pb2 as pb

from server.auth import emails
from server.auth.attempt_store import AttemptStore
from server.auth.mail import Kind
from server.auth.mail_store import MailStore
from server.auth.passwords import Passwords
from server.auth.store import Account, AccountStore
from server.caller import current_caller, current_credentials
from server.clock import Clock
from server.errors import CredentialsInvalid, MailedTokenInvalid
from server.places import current_place

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class PasswordHandlers:
    """A part of AuthService."""

    _accounts: AccountStore
    _attempts: AttemptStore
    _mails: MailStore
    _hashing: Passwords
    _clock: Clock

    async def ChangePassword(
        self, request: pb.ChangePasswordRequest, context: Context
    ) -> pb.ChangePasswordResponse:
        credentials = current_credentials()
        account = await self._accounts.get(credentials.caller)
        names = [account.email, account.email.partition("@")[0]]
        await self._hashing.check_new(request.new_password, "new_password", names=names)
        if not await self.proves(account, request.current_password):
            raise CredentialsInvalid
        renewed = await self._hashing.hash(request.new_password)
        ended, revoked = await self._accounts.change_password(
            account,
            renewed,
            self._clock(),
            kept=credentials.grant_id,
            with_keys=request.revoke_api_keys,
        )
        return pb.ChangePasswordResponse(ended_sessions=ended, revoked_api_keys=revoked)

    async def proves(self, account: Account, password: str) -> bool:
        """Tell whether a password is that of a signed-in account.

        A stolen access token is no way around the wait between two guesses.
        """
        place = current_place()
        async with self._hashing.turn_of(account.email):
            is_allowed = await self._attempts.begin(account.email, place, self._clock())
            matches = await self._hashing.match(account.password_hash, password)
        if not matches or not is_allowed:
            return False
        await self._attempts.succeed(account.email, place, self._clock())
        return True

    async def RequestPasswordReset(
        self, request: pb.RequestPasswordResetRequest, context: Context
    ) -> pb.RequestPasswordResetResponse:
        email = emails.normalize(request.email, "email")
        await self._mails.ask_for(email, Kind.PASSWORD_RESET, self._clock())
        return pb.RequestPasswordResetResponse()

    async def ResetPassword(
        self, request: pb.ResetPasswordRequest, context: Context
    ) -> pb.ResetPasswordResponse:
        await self._hashing.check_new(request.new_password, "new_password", names=())
        # Before a dear hash is made for somebody who made the token up.
        if not await self._mails.is_living(request.token, Kind.PASSWORD_RESET, self._clock()):
            raise MailedTokenInvalid
        renewed = await self._hashing.hash(request.new_password)
        email, revoked = await self._accounts.reset_password(
            request.token, renewed, self._clock(), with_keys=not request.keep_api_keys
        )
        # Whoever guessed in vain until then need not wait any longer.
        await self._attempts.succeed(email, current_place(), self._clock())
        return pb.ResetPasswordResponse(revoked_api_keys=revoked)

    async def RequestEmailVerification(
        self, request: pb.RequestEmailVerificationRequest, context: Context
    ) -> pb.RequestEmailVerificationResponse:
        account = await self._accounts.get(current_caller())
        await self._mails.ask_for(account.email, Kind.EMAIL_VERIFICATION, self._clock())
        return pb.RequestEmailVerificationResponse()

    async def VerifyEmail(
        self, request: pb.VerifyEmailRequest, context: Context
    ) -> pb.VerifyEmailResponse:
        await self._accounts.verify_email(request.token, self._clock())
        return pb.VerifyEmailResponse()
