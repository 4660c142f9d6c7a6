"""Mails: what they say, and who carries them."""

import asyncio
import enum
import os
import smtplib
import ssl
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import Final, Protocol, assert_never

from server import ids
from server.clock import utc_now

_SMTP_SECONDS: Final = 10


class Kind(enum.Enum):
    """Why somebody is written to."""

    PASSWORD_RESET = "password_reset"  # noqa: S105 - the name of a kind
    EMAIL_VERIFICATION = "email_verification"
    INVITATION = "invitation"
    SIGN_UP = "sign_up"
    SIGN_UP_TAKEN = "sign_up_taken"
    """Becomes of a sign-up whose email names an account: nobody asks for it."""


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail to one person."""

    recipient: str
    subject: str
    text: str

    def message(self, sender: str) -> EmailMessage:
        """Return it as it is sent."""
        message = EmailMessage()
        message["From"] = sender
        message["To"] = self.recipient
        message["Subject"] = self.subject
        message["Date"] = format_datetime(utc_now())
        message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2].rstrip(">"))
        # RFC 3834: nobody's holiday notice answers.
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(self.text)
        return message


def write(kind: Kind, recipient: str, token: str, hours: int) -> Mail:
    """Return the mail that brings somebody a token, unless it is of a kind that brings none.

    The token stands alone in its line, so that people and programs find it.
    """
    match kind:
        case Kind.PASSWORD_RESET:
            subject = "Reset your password"
            text = (
                "Somebody, probably you, asked to reset the password of this account.\n"
                f"Within {hours} h this token sets a new one (POST /v1/password:reset):\n\n"
                f"{token}\n\nIf it was not you, do nothing: the password stays what it is.\n"
            )
        case Kind.EMAIL_VERIFICATION:
            subject = "Is this your email address?"
            text = (
                "This address was given for an account of Kimberly.\n"
                f"Within {hours} h this token says that it is yours (POST /v1/email:verify):\n\n"
                f"{token}\n\nIf it is not, do nothing.\n"
            )
        case Kind.INVITATION:
            subject = "You are invited"
            text = (
                "Somebody asks you to join them on Kimberly.\n"
                f"Within {hours} h, whoever has an account with this address joins them by this\n"
                "token (POST /v1/user/tenants:acceptInvitation), and whoever has none by signing\n"
                "up for it (POST /v1/signup, field invitation):\n\n"
                f"{token}\n\nIf you do not know what this is about, do nothing.\n"
            )
        case Kind.SIGN_UP:
            subject = "Confirm your email address"
            text = (
                "Somebody, probably you, signed up to Kimberly with this address.\n"
                f"Within {hours} h this token makes the account (POST /v1/email:verify), for the\n"
                "password that was chosen then; log in with it after that:\n\n"
                f"{token}\n\nIf it was not you, do nothing: there will be no account.\n"
            )
        case Kind.SIGN_UP_TAKEN:
            subject = "You have an account already"
            text = (
                "Somebody, probably you, tried to sign up to Kimberly with this address, which\n"
                "has an account. Log in with it. If the password is forgotten, ask for a mail\n"
                "that resets it (POST /v1/password:requestReset).\n\n"
                "If it was not you, do nothing: whoever it was has not been told of the account.\n"
            )
        case _:
            assert_never(kind)
    return Mail(recipient, subject, text)


class Mailer(Protocol):
    """Carries mails."""

    async def send(self, mail: Mail) -> None:
        """Hand a mail over for good.

        Raises:
            OSError: It could not be handed over.
        """


class Outbox:
    """Puts mails as files into a directory that only its owner can read."""

    def __init__(self, directory: Path, sender: str) -> None:
        self._directory = directory
        self._sender = sender

    async def send(self, mail: Mail) -> None:
        """Write a file, which is whole as soon as it is there."""
        await asyncio.to_thread(self._write, mail)

    def _write(self, mail: Mail) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._directory / f"{ids.new_id().hex}.eml"
        started = file.with_suffix(".part")
        descriptor = os.open(started, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as part:
            part.write(mail.message(self._sender).as_bytes())
            part.flush()
            os.fsync(part.fileno())
        started.rename(file)


@dataclass(frozen=True, slots=True)
class Smtp:
    """Hands mails to a server, which must offer STARTTLS unless it is on this machine."""

    host: str
    port: int
    sender: str
    user: str = ""
    password: str = ""

    async def send(self, mail: Mail) -> None:
        """Hand a mail to the server.

        Raises:
            OSError: The server does not answer, or refuses.
        """
        await asyncio.to_thread(self._send, mail)

    def _send(self, mail: Mail) -> None:
        with smtplib.SMTP(self.host, self.port, timeout=_SMTP_SECONDS) as server:
            if self.host not in {"localhost", "127.0.0.1", "::1"}:
                server.starttls(context=ssl.create_default_context())
            if self.user:
                server.login(self.user, self.password)
            server.send_message(mail.message(self.sender))
