"""One image, one process a service: python -m server auth, memory, jobs; migrate first."""

import json
import os
import sys
from collections.abc import Coroutine
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import uvloop
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from server import telemetry
from server.app import serve
from server.backup.failures import BackupFailed, Busy, Unwanted
from server.backup.manifest import ManifestUnreadable
from server.backup.postgres import ProgramFailed
from server.backup.repository import Damaged
from server.backup.restoring import NotEmpty
from server.backup.sealing import KeyRefused
from server.backup.signing import ManifestForged
from server.backup.verifying import ScratchRefused
from server.embedding_models import ModelUnusable
from server.errors import Problem
from server.kms import KmsUnusable, UnwrapFailed
from server.migrate import MigrationChanged
from server.operations import (
    erase_again,
    list_schedules,
    migrate_database,
    pause_schedule,
    provision_database,
    resume_schedule,
    rotate_audit_key,
    rotate_data_keys,
    rotate_signing_key,
    run_schedule,
    set_plan,
    withdraw_signing_key,
)
from server.provision import WrongRole
from server.rpc.serving import UnsafeSocketDirectory
from server.settings import (
    NEEDED_BY,
    PREFIX,
    BackupBucketSettings,
    BackupSettings,
    MigrationSettings,
    ProvisionSettings,
    RestoreSettings,
    Settings,
    VerificationSettings,
    explain,
)
from server.signed_words import WordForged

_REFUSED = (
    KeyRefused,
    KmsUnusable,
    ManifestUnreadable,
    MigrationChanged,
    ModelUnusable,
    NotEmpty,
    Problem,
    ScratchRefused,
    UnsafeSocketDirectory,
    UnwrapFailed,
    WordForged,
    WrongRole,
)
_FAILED = (BackupFailed, Damaged, ManifestForged, ProgramFailed, Unwanted)
EX_TEMPFAIL = 75
"""Exit status of sysexits.h for what another process is at."""
EX_CONFIG = 78
"""Exit status of sysexits.h for a wrong configuration: trying again will not help."""

ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="As `schedules list` has it.")]
T = TypeVar("T", bound=BaseSettings)
app = typer.Typer(
    help="Services of the memory mesh. Settings are environment variables named KIMBERLY_….",
    no_args_is_help=True,
    add_completion=False,
    # Paragraphs are filled anew for the width of the terminal.
    rich_markup_mode="markdown",
    # Tracebacks are for logs: plain, one event, no values.
    pretty_exceptions_enable=False,
)
backup = typer.Typer(help="Make, verify, list and restore backups.", no_args_is_help=True)
app.add_typer(backup, name="backup")
Point = Annotated[
    str,
    typer.Option(help="A backup, or an instant such as 2026-05-04T12:00:00Z: the newest by then."),
]


Unsigned = Annotated[
    bool,
    typer.Option("--unsigned", help="Take one without a signature, as older releases made them."),
]


@app.command()
def auth() -> None:
    """Serve accounts, tokens, consents and the audit log."""
    _serve("auth")


@app.command()
def memory() -> None:
    """Serve memories and, to workers, scoring."""
    _serve("memory")


@app.command()
def jobs() -> None:
    """Serve jobs and, to workers, their leases."""
    _serve("jobs")


@app.command("migrate")
def migrate_command() -> None:
    """Bring the database schema up to date. Safe to run at any time, by any number at once."""
    settings = _settings(MigrationSettings)
    telemetry.configure("migrate", settings.log_level)
    typer.echo(f"{_run(migrate_database(settings))} migrations applied")


@app.command("provision")
def provision_command() -> None:
    """Make the roles, the database and its extensions. Safe to run again."""
    settings = _settings(ProvisionSettings)
    telemetry.configure("provision", settings.log_level)
    typer.echo(f"{_run(provision_database(settings))} is ready to be migrated")


@app.command("rotate-signing-key")
def rotate_signing_key_command() -> None:
    """Publish a new key for access tokens. It signs in a minute; the old one goes later."""
    settings = _settings(Settings)
    telemetry.configure("rotate-signing-key", settings.log_level)
    typer.echo(f"published {_run(rotate_signing_key(settings))}")


@app.command("withdraw-signing-key")
def withdraw_signing_key_command(
    kid: Annotated[str, typer.Argument(help="As in /.well-known/jwks.json.")],
) -> None:
    """Withdraw a key that is in the wrong hands: within 30 s none of its tokens is believed."""
    settings = _settings(Settings)
    telemetry.configure("withdraw-signing-key", settings.log_level)
    typer.echo(f"withdrawn; {_run(withdraw_signing_key(settings, kid))} signs")


@app.command("rotate-audit-key")
def rotate_audit_key_command() -> None:
    """Have a new key sign checkpoints of the audit log. Older ones stay verifiable."""
    settings = _settings(Settings)
    telemetry.configure("rotate-audit-key", settings.log_level)
    typer.echo(f"checkpoints are signed by {_run(rotate_audit_key(settings))}")


@app.command("rotate-data-keys")
def rotate_data_keys_command() -> None:
    """Have users' data keys wrapped by the newest master key; the job's result says how many."""
    settings = _settings(Settings)
    telemetry.configure("rotate-data-keys", settings.log_level)
    typer.echo(f"enqueued {_run(rotate_data_keys(settings))}")


@app.command("set-plan")
def set_plan_command(
    user: Annotated[str, typer.Argument(help="usr_…")],
    plan: Annotated[str, typer.Argument(help="free or premium")],
) -> None:
    """Give a user a plan that has been paid for."""
    settings = _settings(Settings)
    telemetry.configure("set-plan", settings.log_level)
    typer.echo(f"{user} has {_run(set_plan(settings, user, plan))}")


schedules = typer.Typer(
    help="What the mesh does of its own accord: see when, pause it, have it done now.",
    no_args_is_help=True,
)
app.add_typer(schedules, name="schedules")


@schedules.command("list")
def list_schedules_command() -> None:
    """List the mesh's own schedules: when each runs next, and ran last, in UTC."""
    settings = _settings(Settings)
    telemetry.configure("schedules", settings.log_level)
    for each in _run(list_schedules(settings)):
        upcoming = "paused" if each.paused else f"next {each.next_run_at:%Y-%m-%d %H:%M}"
        last = f"last {each.last_run_at:%Y-%m-%d %H:%M}" if each.last_run_at else "never ran"
        typer.echo(f"{each.name:20} {each.cron:14} {each.time_zone:14} {upcoming:21} {last}")


@schedules.command("pause")
def pause_schedule_command(name: ScheduleName) -> None:
    """Have a schedule make no jobs until it is resumed."""
    settings = _settings(Settings)
    telemetry.configure("schedules", settings.log_level)
    _run(pause_schedule(settings, name))
    typer.echo(f"{name} is paused")


@schedules.command("resume")
def resume_schedule_command(name: ScheduleName) -> None:
    """Have a schedule make jobs again; ticks in the pause were not missed."""
    settings = _settings(Settings)
    telemetry.configure("schedules", settings.log_level)
    typer.echo(f"{name} runs next at {_run(resume_schedule(settings, name)):%Y-%m-%d %H:%M} UTC")


@schedules.command("run")
def run_schedule_command(name: ScheduleName) -> None:
    """Have a schedule make its job now."""
    settings = _settings(Settings)
    telemetry.configure("schedules", settings.log_level)
    typer.echo(f"enqueued {_run(run_schedule(settings, name))}")


@app.command("erase-again")
def erase_again_command() -> None:
    """After a backup of the database was restored: erase again whoever had been erased since.

    And withdraw again what had been withdrawn.
    """
    settings = _settings(Settings)
    telemetry.configure("erase-again", settings.log_level)
    withdrawn, erasures = _run(erase_again(settings))
    typer.echo(f"{erasures} erasures begin again; {withdrawn} withdrawals hold again")


@backup.command("create")
def create_backup_command() -> None:
    """Back up the database and its objects, while the mesh works; remove backups of long ago."""
    settings = _settings(BackupSettings)
    telemetry.configure("backup", settings.log_level)
    typer.echo(json.dumps(_run(_backups().create_backup(settings)), indent=1))


@backup.command("verify")
def verify_backup_command(at: Point = "", *, unsigned: Unsigned = False) -> None:
    """Restore a backup, the newest unless told otherwise, into a scratch server and compare it."""
    settings = _settings(VerificationSettings)
    telemetry.configure("backup-verify", settings.log_level)
    typer.echo(
        json.dumps(_run(_backups().verify_backup(settings, at, unsigned=unsigned)), indent=1)
    )


@backup.command("list")
def list_backups_command() -> None:
    """List the backups there are, the oldest first. Needs no mesh."""
    settings = _settings(BackupBucketSettings)
    telemetry.configure("backup-list", settings.log_level)
    for each in _run(_backups().list_backups(settings)):
        typer.echo(
            f"{each.id}  {each.mark:%Y-%m-%dT%H:%M:%SZ}  {each.rows} rows  {each.objects} objects"
        )


@backup.command("restore")
def restore_backup_command(at: Point = "", *, unsigned: Unsigned = False) -> None:
    """Fill an empty database and an empty bucket from a backup, the newest unless told otherwise.

    Whoever was erased since stays erased, and what was withdrawn stays withdrawn. Start the mesh
    afterwards.
    """
    settings = _settings(RestoreSettings)
    telemetry.configure("backup-restore", settings.log_level)
    restored = _run(_backups().restore_backup(settings, at, unsigned=unsigned))
    typer.echo(
        f"{restored.manifest.id} is restored: {restored.manifest.rows} rows and "
        f"{restored.objects.restored} objects as of {restored.manifest.mark.isoformat()}; "
        f"{restored.erased} users stay erased, {restored.withdrawn} consents are withdrawn again"
    )


@app.command("settings")
def settings_command(
    variable: Annotated[str, typer.Argument(help="Only this one.")] = "",
) -> None:
    """List the environment variables that services read, and whether each must be given."""
    for name, field in Settings.model_fields.items():
        known = f"KIMBERLY_{name.upper()}"
        if variable in ("", known):
            typer.echo(f"{known:40} {_expected(name, field)}")


def _backups() -> ModuleType:
    """Return what makes backups. It knows the queue, whose metrics are not those of a service."""
    return import_module("server.processes.backups")


def _expected(name: str, field: FieldInfo) -> str:
    if name in NEEDED_BY:
        return f"required with {PREFIX}KMS={NEEDED_BY[name]}"
    return "required" if field.is_required() else str(field.default)


def _serve(process: str) -> None:
    settings = _settings(Settings)
    telemetry.configure(process, settings.log_level)
    _run(serve(process, settings))


def _settings(kind: type[T]) -> T:
    try:
        return kind()
    except ValidationError as error:
        _exit(explain(error))


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return uvloop.run(work)
    except _REFUSED as error:
        _exit(str(error))
    except _FAILED as error:
        _exit(str(error), 1)
    except Busy as error:
        _exit(str(error), EX_TEMPFAIL)


def _exit(message: str, status: int = EX_CONFIG) -> NoReturn:
    typer.echo(message, err=True)
    sys.exit(status)


if __name__ == "__main__":
    app(prog_name=f"{Path(sys.executable).name} -m server" if os.isatty(1) else None)
