"""What the apps of Fly.io are told: secrets as `fly secrets import` reads them, and images.

One app a process: an app's secrets are told to all of its machines, so that each has its own.
"""

import base64
import datetime as dt
import re
from collections.abc import Mapping
from typing import Final

from deploy.images import FILE
from deploy.secrets import NAMESPACE as SECRETS_NAMESPACE
from deploy.secrets import Values
from local.certificates import KeyPair, Names, make_leaf
from server import access
from server.access import EDGE, WORKER
from server.settings import PREFIX

STORES: Final = ("postgres", "valkey")
PROCESSES: Final = ("auth", "memory", "jobs", WORKER, EDGE)
APPS: Final = (*STORES, "migration", *PROCESSES, "backup")
"""In the order in which they are deployed."""
IMAGES: Final = ("kimberly", "envoy", "backup", *STORES)
"""Short names of the images that apps are, or are made of."""
TRUST_DOMAIN: Final = "kimberly.local"
NAMESPACE: Final = "fly"
LIFETIME: Final = dt.timedelta(days=90)
"""Of the certificates. deploy/fly.sh issues new ones: it has to run again before these end."""

Key = tuple[str, str]
"""The name of a secret, and the key in it."""

_DATABASES: Final[Mapping[str, Key]] = {
    "KIMBERLY_DATABASE_URL": ("database", "application-url"),
    "KIMBERLY_SYSTEM_DATABASE_URL": ("database", "system-url"),
}
_S3: Final[Mapping[str, Key]] = {
    "KIMBERLY_S3_ACCESS_KEY": ("s3", "access-key"),
    "KIMBERLY_S3_SECRET_KEY": ("s3", "secret-key"),
}
_SERVICE: Final[Mapping[str, Key]] = {
    **_DATABASES,
    **_S3,
    "KIMBERLY_REDIS_URL": ("redis", "url"),
}
_MASTER_KEY: Final[Mapping[str, Key]] = {"KIMBERLY_MASTER_KEY": ("key", "master.key")}
SECRETS: Final[Mapping[str, Mapping[str, Key]]] = {
    "postgres": {"POSTGRES_PASSWORD": ("database-owner", "superuser-password")},
    "valkey": {"USERS_ACL": ("redis", "users.acl")},
    "migration": {
        **_DATABASES,
        "KIMBERLY_OWNER_DATABASE_URL": ("database-owner", "owner-url"),
        "KIMBERLY_SUPERUSER_DATABASE_URL": ("database-owner", "superuser-url"),
        "KIMBERLY_BACKUP_DATABASE_URL": ("backup", "database-url"),
    },
    "auth": {
        **_SERVICE,
        **_MASTER_KEY,
        "KIMBERLY_BACKUP_S3_ACCESS_KEY": ("backup", "erasures-access-key"),
        "KIMBERLY_BACKUP_S3_SECRET_KEY": ("backup", "erasures-secret-key"),
        "KIMBERLY_SMTP_PASSWORD": ("mails", "smtp-password"),
    },
    "memory": {**_SERVICE, **_MASTER_KEY},
    "jobs": _SERVICE,
    WORKER: {},
    EDGE: {},
    "backup": {
        **_S3,
        "KIMBERLY_SYSTEM_DATABASE_URL": ("database", "system-url"),
        "KIMBERLY_BACKUP_DATABASE_URL": ("backup", "database-url"),
        "KIMBERLY_BACKUP_S3_ACCESS_KEY": ("backup", "access-key"),
        "KIMBERLY_BACKUP_S3_SECRET_KEY": ("backup", "secret-key"),
        "KIMBERLY_BACKUP_RECIPIENTS": ("backup", "recipients"),
        "KIMBERLY_BACKUP_SIGNING_KEY": ("backup-signing", "key"),
    },
}
"""By app, which variable is which secret: what the containers of its pod are given."""
FILES: Final = ("KIMBERLY_MASTER_KEY", "USERS_ACL")
"""What is a file, and goes as base64."""
_STORE: Final = re.compile(rf"@({'|'.join(STORES)})(?:\.{SECRETS_NAMESPACE}\.svc)?:")
_PINNED: Final = re.compile(r"- name: (\S+)\n  newName: (\S+)\n  digest: (\S+)\n")


class NotGiven(Exception):
    """A secret that comes from elsewhere was never filled in."""


class NotPinned(Exception):
    """An image is not named by its digest."""


def variables(
    app: str, values: Values, *, prefix: str, host_name: str, now: dt.datetime
) -> dict[str, str]:
    """Return the secrets of an app, as variables of its machines.

    Args:
        app: One of APPS.
        values: Of the environment `fly`; in its URLs stores have the names of the manifests.
        prefix: What the names of all apps begin with.
        host_name: By which clients call the edge.
        now: When certificates are issued.

    Raises:
        NotGiven: One is empty.
    """
    told = dict[str, str]()
    for variable, (name, key) in SECRETS[app].items():
        value = _STORE.sub(rf"@{prefix}-\1.internal:", values[name][key])
        if not value:
            raise NotGiven(f"{name}/{key} was never filled in: sops edit secrets/fly.enc.yaml")
        told[variable] = _base64(value) if variable in FILES else value
    if app in PROCESSES:
        told |= _identity(app, values, now)
    if app == EDGE:
        told |= _public(values, host_name, now)
    return told


def lines(app: str, told: Mapping[str, str]) -> str:
    """Return variables as `flyctl secrets import` reads them, after the name of their app.

    None of their values has a quote or an end of line.
    """
    return "".join(f"{app} {name}={value}\n" for name, value in told.items())


def image(name: str, text: str = "") -> str:
    """Return an image by its digest, as the manifests have it.

    Raises:
        NotPinned: They have a tag.
    """
    for found, at, digest in _PINNED.findall(text or FILE.read_text()):
        if found == name:
            return f"{at}@{digest}"
    raise NotPinned(f"{name} is not pinned: python -m deploy pin {name}=sha256:…")


def _identity(app: str, values: Values, now: dt.datetime) -> dict[str, str]:
    names = Names(access.spiffe_id(TRUST_DOMAIN, NAMESPACE, app))
    leaf = make_leaf(_authority(values), names, now=now, lifetime=LIFETIME)
    return {
        f"{PREFIX}IDENTITY_CERTIFICATE": _base64(leaf.certificate_pem.decode()),
        f"{PREFIX}IDENTITY_KEY": _base64(leaf.key_pem.decode()),
        f"{PREFIX}IDENTITY_AUTHORITY": _base64(values["authority"]["ca.crt"]),
    }


def _public(values: Values, host_name: str, now: dt.datetime) -> dict[str, str]:
    """Return the certificate that clients see: the one given, or one for those who try it out."""
    given = values["edge-public"]
    certificate, key = given["tls.crt"], given["tls.key"]
    if not certificate:
        names = Names(dns_names=(host_name,))
        leaf = make_leaf(_authority(values), names, now=now, lifetime=LIFETIME)
        certificate, key = leaf.certificate_pem.decode(), leaf.key_pem.decode()
    return {
        f"{PREFIX}PUBLIC_CERTIFICATE": _base64(certificate),
        f"{PREFIX}PUBLIC_KEY": _base64(key),
    }


def _authority(values: Values) -> KeyPair:
    pair = values["authority"]
    return KeyPair.parse(pair["ca.crt"].encode(), pair["ca.key"].encode())


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
