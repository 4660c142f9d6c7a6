"""What a process is told by its environment."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "KIMBERLY_"

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """Settings of a service; each is the environment variable of its name, after KIMBERLY_."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

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
    master_key_file: Path
    """32 random bytes in base64: wraps the private signing keys."""
    token_issuer: str
    token_audience: str = "kimberly"  # noqa: S105 - the name of an audience
    trust_domain: str
    namespace: str

    database_connections: int = Field(default=10, ge=1, le=100)
    system_database_connections: int = Field(default=4, ge=1, le=100)
    access_token_seconds: int = Field(default=600, ge=30, le=900)
    refresh_token_seconds: int = Field(default=30 * 86_400, ge=60)
    password_hash_concurrency: int = Field(default=2, ge=1)
    jwks_refresh_seconds: Seconds = 30.0
    unary_seconds: Seconds = 10.0
    """Longest time a unary call may take, whatever deadline its client set."""
    stream_seconds: Seconds = 900.0
    """The same for calls that stream."""
    short_term_seconds: int = Field(default=86_400, ge=1)
    upload_url_seconds: int = Field(default=900, ge=1, le=86_400)
    lease_seconds: Seconds = 15.0
    audit_seal_seconds: Seconds = 1.0
    meditation_schedule: str = "0 2 * * *"
    """When the nightly meditation starts: a cron expression in UTC."""
    meditation_shards: int = Field(default=8, ge=1, le=1024)
    drain_seconds: Seconds = 5.0
    health_interval_seconds: Seconds = 1.0
    """How long peers may take to see that this process is about to stop."""
    log_level: str = "info"


class MigrationSettings(BaseSettings):
    """Settings of `python -m server migrate`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    owner_database_url: SecretStr
    """PostgreSQL as the role that owns the tables."""
    log_level: str = "info"


def explain(error: ValidationError) -> str:
    """Say which variables are missing or wrong, one a line."""
    lines = [
        f"  {PREFIX}{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}"
        for problem in error.errors(include_input=False)
    ]
    return "\n".join(["The environment is not complete:", *lines])
