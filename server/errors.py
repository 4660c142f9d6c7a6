"""What can go wrong, in the words of the domain.

`server.rpc.status` turns these into google.rpc.Status. The class name says the kind, `reason`
is a name of kimberly.errors.v1.ErrorReason without its prefix.
"""

from dataclasses import dataclass
from datetime import timedelta


class Problem(Exception):
    """A refusal that the caller is told about. Its text is for the caller to read."""

    reason = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Violation:
    """A field that is at fault, by its path in the request, and what is wrong with it."""

    field: str
    description: str


class InvalidArgument(Problem):
    """The request can never succeed as it stands."""

    reason = "FIELD_INVALID"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.violations = (Violation(field, description),)


class MalformedMessage(Problem):
    """The bytes are no message of the method's type."""

    reason = "MESSAGE_MALFORMED"

    def __init__(self) -> None:
        super().__init__("the request is not a valid message of its type")


class PageTokenInvalid(InvalidArgument):
    """The page token is damaged or belongs to another list."""

    reason = "PAGE_TOKEN_INVALID"

    def __init__(self) -> None:
        super().__init__("page_token", "is not a token of this list")


class Unauthenticated(Problem):
    """Nobody known is calling."""

    reason = "TOKEN_INVALID"


class CredentialsInvalid(Unauthenticated):
    """Email and password do not match. Says nothing about which of the two is wrong."""

    reason = "CREDENTIALS_INVALID"

    def __init__(self) -> None:
        super().__init__("email or password is wrong")


class RefreshTokenInvalid(Unauthenticated):
    """The refresh token does not open a session any more."""

    reason = "REFRESH_TOKEN_INVALID"

    def __init__(self) -> None:
        super().__init__("the refresh token is not valid; log in again")


class ApiKeyInvalid(Unauthenticated):
    """The API key opens nothing any more."""

    reason = "API_KEY_INVALID"

    def __init__(self) -> None:
        super().__init__("the API key is unknown, expired or revoked")


class MailedTokenInvalid(Unauthenticated):
    """The token from a mail is good for nothing any more."""

    reason = "MAILED_TOKEN_INVALID"

    def __init__(self) -> None:
        super().__init__("the token is unknown, expired or used; ask for another mail")


class AccountErased(Unauthenticated):
    """Who calls has asked to be erased."""

    reason = "ACCOUNT_ERASED"

    def __init__(self) -> None:
        super().__init__(
            "the account is erased; POST /v1/user/erasures:receipt says how far that is"
        )


class AgentDisabled(Unauthenticated):
    """The agent that acts was disabled or deleted; its tokens are refused a little later."""

    def __init__(self) -> None:
        super().__init__("the agent is disabled or gone")


class PermissionDenied(Problem):
    """The caller is known and may not."""

    reason = "METHOD_NOT_ALLOWED"

    def __init__(self) -> None:
        super().__init__("the caller may not use this method")


class ScopeMissing(PermissionDenied):
    """The access token is not good for this method."""

    reason = "SCOPE_MISSING"

    def __init__(self, scope: str) -> None:
        Problem.__init__(self, f"the access token is not good for this: it lacks the scope {scope}")


class ProofInvalid(Problem):
    """The caller did not prove that they are who they seem to be."""

    reason = "PROOF_INVALID"

    def __init__(self) -> None:
        super().__init__("the password is wrong; nothing was done")


class RateLimited(Problem):
    """Too much of something within a time."""

    reason = "RATE_LIMITED"

    def __init__(self, what: str, retry_after: timedelta) -> None:
        super().__init__(f"too many {what}; try again later")
        self.retry_after = retry_after


class ConsentMissing(Problem):
    """The user has not agreed."""

    reason = "CONSENT_MISSING"

    def __init__(self, purpose: str) -> None:
        super().__init__(
            f"the user has not consented to {purpose}; grant it with POST /v1/user/consents"
        )


class NotFound(Problem):
    """There is no such thing, or it is not the caller's: both look the same."""

    reason = "RESOURCE_NOT_FOUND"

    def __init__(self, kind: str) -> None:
        super().__init__(f"there is no such {kind}")


class AlreadyExists(Problem):
    """Something with this identity exists."""

    reason = "RESOURCE_EXISTS"


class EtagMismatch(Problem):
    """Someone else was faster."""

    reason = "ETAG_MISMATCH"

    def __init__(self) -> None:
        super().__init__("the resource changed since the etag was read; read it again")


class StateConflict(Problem):
    """The resource is not in a state that allows the call."""

    reason = "STATE_CONFLICT"


class MailsNotSent(Problem):
    """What is asked for comes by mail, and nobody is told to carry any."""

    reason = "MAILS_NOT_SENT"

    def __init__(self) -> None:
        super().__init__(
            "accounts are made by mail, and this mesh sends none; its operator sets"
            " KIMBERLY_SMTP_HOST"
        )


class RequestIdReused(Problem):
    """The request id stands for another request."""

    reason = "REQUEST_ID_REUSED"

    def __init__(self) -> None:
        super().__init__("request_id was used before with other contents; choose a new one")


class QuotaExceeded(Problem):
    """The write does not fit."""

    reason = "QUOTA_EXCEEDED"

    def __init__(
        self,
        subject: str,
        used: int,
        limit: int,
        advice: str,
        unit: str = "bytes",
        *,
        room: int = 0,
    ) -> None:
        super().__init__(f"{subject}: {used} of {limit} {unit} are used; {advice}")
        self.subject = subject
        self.room = room
        """How much would still have fitted."""


class LeaseLost(Problem):
    """The lease passed to another worker; nothing was written."""

    reason = "LEASE_LOST"

    def __init__(self) -> None:
        super().__init__("the lease is no longer yours; nothing was written")


class UploadMismatch(Problem):
    """The object is not the one that was announced."""

    reason = "UPLOAD_MISMATCH"


class ReaderTooSlow(Problem):
    """The reader of a stream takes nothing while much waits for it."""

    reason = "READER_TOO_SLOW"

    def __init__(self) -> None:
        super().__init__("changes wait and are not taken; watch again from the last cursor")


class ContentUnreadable(Problem):
    """Encrypted content does not open: its key was shredded, or it was damaged."""

    reason = "CONTENT_UNREADABLE"

    def __init__(self, what: str = "the content") -> None:
        super().__init__(f"{what} cannot be decrypted: its key is gone, or it was damaged")


class DeadlineExceeded(Problem):
    """The call took too long."""

    reason = "DEADLINE_EXCEEDED"

    def __init__(self) -> None:
        super().__init__("the call took longer than its deadline")


class StoreUnavailable(Problem):
    """A store does not answer. Whether a write took place is not known: repeat it by request_id."""

    reason = "STORE_UNAVAILABLE"

    def __init__(self, store: str) -> None:
        super().__init__(f"{store} does not answer; try again")
