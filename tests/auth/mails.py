"""The mails that the auth service of one test sends."""

import email as emails
import email.policy
from pathlib import Path

import pytest

from server.auth.mail import Outbox
from server.auth.mail_store import MailStore
from server.auth.postman import Postman
from tests.conftest import FakeClock

SENDER = "Kimberly <no-reply@kimberly.test>"


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "mails"


@pytest.fixture
def postman(mails: MailStore, outbox: Path, clock: FakeClock) -> Postman:
    return Postman(mails, Outbox(outbox, SENDER), clock=clock)


async def deliver(postman: Postman) -> None:
    while await postman.deliver():
        pass


def read(outbox: Path) -> list[emails.message.EmailMessage]:
    files = sorted(outbox.glob("*.eml"))
    return [
        emails.message_from_bytes(file.read_bytes(), policy=email.policy.default) for file in files
    ]


def token_in(mail: emails.message.EmailMessage) -> str:
    lines = mail.get_content().splitlines()
    return str(next(line for line in lines if len(line) == 43 and " " not in line))


async def mailed(outbox: Path, postman: Postman, subject: str) -> str:
    """Have the mails delivered, and return the token in the last one about a subject."""
    await deliver(postman)
    return token_in([mail for mail in read(outbox) if subject in mail["Subject"]][-1])
