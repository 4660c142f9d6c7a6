"""What a process is told by its environment."""

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server import tracing

PREFIX = "KIMBERLY_"

Seconds = Annotated[float, Field(gt=0)]

_NOWHERE: Final = Path()
NEEDED_BY: Final = {
    "master_key_file": "local",
    "vault_address": "vault",
    "vault_token_file": "vault",
}
"""Settings that must be given with one kind of key manager."""
_VAULT_ADDRESS: Final = re.compile(
    r"https://[^/?#@\s]+/?|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/?"
)


class KmsSettings(BaseSettings):
    """Who keeps the keys that keys are wrapped with."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    kms: Literal["local", "vault"] = "local"
    """Who wraps the private signing keys and the users' data keys."""
    master_key_file: Path = Field(default=_NOWHERE, validate_default=True)
    """With the local kms: 32 random bytes in base64 a line, the newest last. Mode 0600."""
    vault_address: str = Field(default="", validate_default=True)
    """With the vault kms: https://host:port of HashiCorp Vault."""
    vault_token_file: Path = Field(default=_NOWHERE, validate_default=True)
    """Mode 0600; read anew for every call."""
    vault_key: str = Field(default="kimberly", pattern=r"^[\w.-]+$")
    """A key of the transit engine, made with type=aes256-gcm96 and derived=true."""
    vault_mount: str = Field(default="transit", pattern=r"^[\w.-]+(/[\w.-]+)*$")
    vault_namespace: str = ""
    vault_ca_file: Path | None = None
    """Certificate authorities in PEM; unset: those that the system trusts."""

    @field_validator("master_key_file", "vault_address", "vault_token_file")
    @classmethod
    def _is_given(cls, value: Path | str, info: ValidationInfo) -> Path | str:
        kms = info.data.get("kms")
        if NEEDED_BY.get(str(info.field_name)) == kms and value in ("", _NOWHERE):
            raise PydanticCustomError("missing", f"Field required with {PREFIX}KMS={kms}")
        return value

    @field_validator("vault_address")
    @classmethod
    def _is_encrypted(cls, value: str) -> str:
        if value and not _VAULT_ADDRESS.fullmatch(value):
            raise PydanticCustomError("url", "must be https://host:port; http is for loopback only")
        return value


class Settings(KmsSettings):
    """Settings of a service; each is the environment variable of its name, after KIMBERLY_."""

    database_url: SecretStr
    """PostgreSQL as the application role: sees one user's rows at a time."""
    system_database_url: SecretStr
    """PostgreSQL as the system role: sees all tenants, for queues, scoring and log-in."""
    redis_url: SecretStr
    s3_endpoint: str
    """host:port of the S3 API, as services and clients both reach it: URLs are signed for it."""
    s3_access_key: SecretStr
    s3_secret_key: SecretStr
    s3_bucket: str = "kimberly"
    s3_region: str = "us-east-1"
    s3_secure: bool = True
    listen_socket: Path
    """Unix socket to serve on; its directory must be 0700: only the sidecar may reach it."""
    outbound_socket: Path
    """Unix socket of the sidecar's outbound listener."""
    metrics_socket: Path | None = None
    """Unix socket to tell Prometheus on what is measured, beside listen_socket. Unset: nowhere."""
    metrics_seconds: Seconds = 30.0
    """How often is counted what only the database knows, such as how many jobs wait."""
    otlp_endpoint: str = Field(default="", pattern=tracing.ENDPOINT)
    """Where a collector takes traces by OTLP over gRPC: http://host:port. Unset: no traces."""
    trace_ratio: float = Field(default=0.05, ge=0, le=1)
    """Which part is traced: of the calls, for the edge; for others, of what begins with them."""
    token_issuer: str = Field(pattern=r"^https://[^/?#@\s]+$")
    """https://host:port of the edge: where standard clients look for what they are told of it, and
    so the issuer that they expect (OpenID Connect Discovery 1.0, section 4.3)."""
    token_audience: str = "kimberly"  # noqa: S105 - the name of an audience
    trust_domain: str
    namespace: str

    database_connections: int = Field(default=10, ge=1, le=100)
    system_database_connections: int = Field(default=4, ge=1, le=100)
    access_token_seconds: int = Field(default=600, ge=30, le=900)
    refresh_token_seconds: int = Field(default=30 * 86_400, ge=60)
    password_hash_concurrency: int = Field(default=2, ge=1)
    breached_passwords_file: Path | None = None
    """SHA-1 hashes of passwords that nobody may choose: ordered by hash, as Have I Been Pwned
    offers them for download."""
    sign_up_confirms_email: bool = True
    """Whether an account is made only by a token that was mailed to its address. Otherwise whoever
    signs up is told whether the address has one, and acts as its user before it is known to be
    theirs: for a developer's machine."""
    mail_sender: str = "Kimberly <no-reply@kimberly.local>"
    mail_directory: Path | None = None
    """Where mails are put as files, mode 0600. Unset, and no smtp_host: mails wait."""
    smtp_host: str = ""
    """Who carries mails: by STARTTLS, unless it is this machine. Comes before mail_directory."""
    smtp_port: int = Field(default=587, ge=1, le=65_535)
    smtp_user: str = ""
    smtp_password: SecretStr = SecretStr("")
    jwks_refresh_seconds: Seconds = 20.0
    unary_seconds: Seconds = 10.0
    """Longest time a unary call may take, whatever deadline its client set."""
    stream_seconds: Seconds = 900.0
    """The same for calls that stream."""
    question_models_directory: Path | None = None
    """Holds a folder for each model that makes vectors of questions which bring none, under its
    name, as the workers that make those of memories have it. Unset: there are none."""
    short_term_seconds: int = Field(default=86_400, ge=1, le=7 * 86_400)
    """How long short-term memories live, unless their user chose otherwise."""
    upload_url_seconds: int = Field(default=900, ge=1, le=86_400)
    sweep_margin_seconds: int = Field(default=3600, ge=60)
    """What is younger may still be written: the sweep of the object store leaves it alone."""
    rate_limit_scale: float = Field(default=1.0, ge=0)
    """How many times the calls of their plan users may make, and callers without a token those of
    their address; 0: as many as they like."""
    export_days: int = Field(default=7, ge=1, le=90)
    """How long an export can be downloaded."""
    erasure_settle_seconds: int = Field(default=30, ge=0)
    """How long an erasure waits before it removes anything: longer than a call may take."""
    retention_schedule: str = "47 * * * *"
    """When memories are archived and deleted whose time has come: a cron expression in UTC."""
    sweep_schedule: str = "17 * * * *"
    """When the object store is swept: a cron expression in UTC."""
    lease_seconds: Seconds = 15.0
    job_limits: dict[str, Annotated[int, Field(ge=1)]] = {}
    """How many jobs of a kind run at once in the whole mesh, as JSON; other kinds: any number."""
    done_job_days: float = Field(default=7, gt=0)
    """How long jobs are kept that succeeded or were cancelled."""
    dead_job_days: float = Field(default=30, gt=0)
    """How long jobs are kept that were given up."""
    audit_seal_seconds: Seconds = 1.0
    audit_checkpoint_seconds: Seconds = 300.0
    """How long a change of the whole audit log by the database's owner may go unnoticed.

    Jobs of the kind "audit.checkpoint" are made as often as that; not more often than each second.
    """
    meditation_schedule: str = "0 2 * * *"
    """When the nightly meditation starts: a cron expression."""
    meditation_time_zone: str = "UTC"
    """Where that is read: an IANA name such as "Europe/Berlin"."""
    promotion_schedule: str = "30 * * * *"
    """When short-term memories that have earned it move to the long term."""
    rewrap_schedule: str = "30 3 * * 0"
    """When data keys are wrapped by the newest master key, if an older one still does."""
    meditation_shards: int = Field(default=8, ge=1, le=1024)
    scoring_writers: int = Field(default=1, ge=1)
    """How many batches of scores are stored at the same time: each keeps a core busy."""
    archived_a_day: int = Field(default=1000, ge=1)
    """How many memories of a user are archived in 24 hours because a tier is over its quota."""
    drain_seconds: Seconds = 5.0
    health_interval_seconds: Seconds = 2.0
    """How long peers may take to see that this process is about to stop: the interval between two
    checks of theirs, and the time that they give one."""
    log_level: str = "info"
    backup_s3_endpoint: str = ""
    """With the next: the bucket of backups, to tell it who is to be erased before anything is
    removed, and which consent was withdrawn before that is acknowledged. A key that may write under
    erasures/ and withdrawals/ is enough. Unset: the next backup tells it."""
    backup_s3_access_key: SecretStr = SecretStr("")
    backup_s3_secret_key: SecretStr = SecretStr("")
    backup_s3_bucket: str = "kimberly-backups"
    backup_s3_region: str = "us-east-1"
    backup_s3_secure: bool = True


class MigrationSettings(BaseSettings):
    """Settings of `python -m server migrate`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    owner_database_url: SecretStr
    """PostgreSQL as the role that owns the tables."""
    log_level: str = "info"


class ProvisionSettings(BaseSettings):
    """Settings of `python -m server provision`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    superuser_database_url: SecretStr
    """PostgreSQL as who may make roles and databases."""
    owner_database_url: SecretStr
    """Names the database, and the role that is to own it."""
    database_url: SecretStr
    system_database_url: SecretStr
    backup_database_url: SecretStr | None = None
    """Names the role that backups are made as: it reads every row. Unset: there is none."""
    log_level: str = "info"


class BackupBucketSettings(BaseSettings):
    """Settings of `python -m server backup list`: where backups are."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    backup_s3_endpoint: str
    backup_s3_access_key: SecretStr
    backup_s3_secret_key: SecretStr
    backup_s3_bucket: str = "kimberly-backups"
    backup_s3_region: str = "us-east-1"
    backup_s3_secure: bool = True
    log_level: str = "info"


class BackupSettings(BackupBucketSettings):
    """Settings of `python -m server backup create`. None of its keys opens a backup."""

    backup_database_url: SecretStr
    """PostgreSQL as the backup role: reads every row, and changes none. It may name a replica that
    streams from the database and holds up its vacuum (hot_standby_feedback = on)."""
    system_database_url: SecretStr
    """The database itself: what a replica has yet to learn is asked there."""
    s3_endpoint: str
    s3_access_key: SecretStr
    """May read and list the bucket of the mesh; that is enough."""
    s3_secret_key: SecretStr
    s3_bucket: str = "kimberly"
    s3_region: str = "us-east-1"
    s3_secure: bool = True
    backup_recipients: str
    """Public keys of age, separated by spaces: whoever has one of their secret halves can
    restore. One of them should be kept where the mesh cannot be reached from."""
    backup_signing_key: SecretStr
    """Private key of Ed25519, 32 bytes in base64: signs the manifest of each backup."""
    backup_days: int = Field(default=30, ge=1)
    """For how long every backup is kept."""
    backup_weekly_days: int = Field(default=90, ge=1)
    """For how long one of each week is kept."""
    postgres_programs: Path | None = None
    """Where pg_dump and pg_restore are; unset: on the path."""
    lease_seconds: Seconds = 15.0


class OpenBackupSettings(BackupBucketSettings):
    """Settings of whoever reads backups."""

    backup_identity_file: Path
    """Secret keys of age, as age-keygen writes them. Mode 0600."""
    backup_signers: str
    """Public keys of those who sign backups, 32 bytes in base64 each, separated by spaces."""
    postgres_programs: Path | None = None


class VerificationSettings(OpenBackupSettings, KmsSettings):
    """Settings of `python -m server backup verify`."""

    system_database_url: SecretStr
    """Where is told what was found."""
    scratch_database_url: SecretStr
    """A PostgreSQL server that is for this alone, as its superuser."""
    lease_seconds: Seconds = 15.0


class RestoreSettings(OpenBackupSettings, Settings):
    """Settings of `python -m server backup restore`: those of a service, and of a new database."""

    owner_database_url: SecretStr
    """PostgreSQL as the role that is to own the tables."""


def explain(error: ValidationError) -> str:
    """Say which variables are missing or wrong, one a line."""
    lines = [
        f"  {PREFIX}{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}"
        for problem in error.errors(include_input=False)
    ]
    return "\n".join(["The environment is not complete:", *lines])
