"""How commands reach a mesh: options that all of them have, and what can go wrong."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final, NoReturn, TypeVar

import grpc
import typer

from kimberly.client import Client, connect, reason_of

T = TypeVar("T")

COULD_NOT_TELL: Final = 2
"""Exit status when there is no answer. Wrong usage has the same."""
_TOKEN_VARIABLE: Final = "KIMBERLY_TOKEN"  # noqa: S105 - the name of a variable
_KEY_VARIABLE: Final = "KIMBERLY_API_KEY"

Address = Annotated[
    str,
    typer.Option(
        envvar="KIMBERLY_ADDRESS", help="Host and port of the mesh's edge.", show_default=True
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="KIMBERLY_CA",
        exists=True,
        dir_okay=False,
        help="PEM file of the authority that signed the edge's certificate. Without it, those "
        "that gRPC trusts.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help=f"File that holds an access token. Without it the environment variable "
        f"{_TOKEN_VARIABLE} does, or {_KEY_VARIABLE} holds an API key: a token on the command "
        "line would show in the list of processes.",
    ),
]
LOCAL_EDGE: Final = "localhost:8443"


def call(
    work: Callable[[Client], Awaitable[T]], address: str, ca: Path | None, token_file: Path | None
) -> T:
    """Do some work as a user of the mesh; end the command when that cannot be done."""
    return asyncio.run(_call(work, address, ca, _token(token_file)))


async def _call(
    work: Callable[[Client], Awaitable[T]], address: str, ca: Path | None, token: str
) -> T:
    try:
        async with connect(address, ca, access_token=token) as client:
            if not token:
                await client.use_api_key(_api_key())
            return await work(client)
    except grpc.aio.AioRpcError as error:
        reason = reason_of(error)
        give_up(
            f"{address}: {error.details()}"
            + (f" ({reason})" if reason else f" ({error.code().name})")
        )


def give_up(message: str) -> NoReturn:
    """End the command: what was asked for could not be told."""
    typer.echo(message, err=True)
    raise typer.Exit(COULD_NOT_TELL)


def knows_a_user(token_file: Path | None) -> bool:
    """Tell whether there is an access token or an API key to act by."""
    return bool(_given(token_file) or _api_key())


def _token(token_file: Path | None) -> str:
    if not knows_a_user(token_file):
        give_up(
            f"no access token: set {_TOKEN_VARIABLE} or {_KEY_VARIABLE}, or name a file with "
            "--token-file"
        )
    return _given(token_file)


def _given(token_file: Path | None) -> str:
    token = token_file.read_text() if token_file else os.environ.get(_TOKEN_VARIABLE, "")
    return token.strip()


def _api_key() -> str:
    return os.environ.get(_KEY_VARIABLE, "").strip()
