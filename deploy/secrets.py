"""The secrets of an environment: which there are, how they are made, and how they are kept.

Kept means encrypted by SOPS to the age keys of those who may read them. What is listed here is what
the manifests may refer to; production has the same names in Vault.
"""

import base64
import hashlib
import json
import re
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pyrage import x25519

from local.layout import CHECKOUT
from server.cache import KEY_PREFIX
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM

Values = Mapping[str, Mapping[str, str]]
"""Values by the name of the secret and the key in it."""

NAMESPACE: Final = "kimberly"
DIRECTORY: Final = CHECKOUT / "secrets"
TO_BE_GIVEN: Final = {"dns": ("api-token",), "alerts": ("smtp-password",)}
"""What comes from elsewhere and stays empty until somebody fills it in with `sops edit`."""
BACKUPS_INSIDE: Final = ("local",)
"""Environments whose backups lie in their own object store: to try things out."""
STORES_OUTSIDE: Final = ("free",)
"""Environments whose object store is not ours: its keys come from there."""
TELLING_NOBODY: Final = ("free", "local")
"""Environments without Alertmanager, which would mail alerts."""
_SUPERUSER: Final = "postgres"
_REDIS_USER: Final = "mesh"
_ENCRYPTED: Final = "^(data|stringData)$"
# Put together here, so that this file is none that holds them.
_MARKS: Final = (
    b"AGE-SECRET" + b"-KEY-1",
    *(b"-----BEGIN " + kind + b"PRIVATE KEY-----" for kind in (b"", b"RSA ", b"EC ", b"OPENSSH ")),
)
_SECRET: Final = re.compile(rb"^kind: Secret$", re.MULTILINE)


def new_values(environment: str) -> dict[str, dict[str, str]]:
    """Return fresh values of every secret of an environment."""
    passwords = {role: _password() for role in (APPLICATION, SYSTEM, OWNER, BACKUP, _SUPERUSER)}
    redis, access_key, secret_key = _password(), secrets.token_hex(10), _password()
    identity = {
        "name": "kimberly",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    made = {
        "database": {
            "application-url": _url(APPLICATION, passwords),
            "system-url": _url(SYSTEM, passwords),
        },
        "database-owner": {
            "owner-url": _url(OWNER, passwords),
            "superuser-url": _url(_SUPERUSER, passwords, database="postgres"),
            "superuser-password": passwords[_SUPERUSER],
        },
        "database-superuser": {"username": _SUPERUSER, "password": passwords[_SUPERUSER]},
        "redis": {
            "url": f"redis://{_REDIS_USER}:{redis}@valkey:6379/0",
            "users.acl": _access_list(redis),
        },
        "s3": {
            "access-key": access_key,
            "secret-key": secret_key,
            "s3.json": json.dumps({"identities": [identity]}),
        },
        "key": {"master.key": f"{_master_key()}\n"},
        **_backup(_url(BACKUP, passwords)),
    }
    if environment in BACKUPS_INSIDE:
        for whose in ("", "erasures-"):
            made["backup"] |= {f"{whose}access-key": access_key, f"{whose}secret-key": secret_key}
    if environment in STORES_OUTSIDE:
        made["s3"] = {"access-key": "", "secret-key": ""}
    given = {name: dict.fromkeys(keys, "") for name, keys in TO_BE_GIVEN.items()}
    if environment in TELLING_NOBODY:
        del given["alerts"]
    return made | given


def rotated(values: Values, name: str) -> dict[str, dict[str, str]]:
    """Return the values with one secret made anew.

    A new master key goes below the old ones: what those wrapped is still to be read. The roles of
    the database follow at the next migration job, which sets their passwords.

    Raises:
        KeyError: There is no such secret, or it comes from elsewhere.
    """
    fresh = new_values("")
    if name in TO_BE_GIVEN or name not in fresh:
        raise KeyError(name)
    together = [name]
    if name == "key":
        fresh[name]["master.key"] = values[name]["master.key"] + fresh[name]["master.key"]
    if name == "backup-identity":
        # What the old keys sealed is to be opened for as long as it is kept.
        fresh[name]["identity"] = values[name]["identity"] + fresh[name]["identity"]
        fresh["backup"] = {**values["backup"], "recipients": fresh["backup"]["recipients"]}
        together = [name, "backup"]
    if name.startswith("database"):
        together = [each for each in fresh if each.startswith("database")]
        backup_url = fresh["backup"]["database-url"]
        fresh["backup"] = {**values["backup"], "database-url": backup_url}
        together.append("backup")
    return {**{each: dict(keys) for each, keys in values.items()}} | {
        each: {key: fresh[each][key] for key in values[each]} for each in together
    }


def documents(values: Values, namespace: str = NAMESPACE) -> str:
    """Return the secrets as Kubernetes takes them."""
    text: str = yaml.safe_dump_all(
        (
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name, "namespace": namespace},
                "type": _kind(keys),
                "stringData": dict(keys),
            }
            for name, keys in values.items()
        ),
        sort_keys=False,
    )
    return text


def values_of(text: str) -> dict[str, dict[str, str]]:
    """Return the values of secrets as Kubernetes takes them."""
    return {each["metadata"]["name"]: each["stringData"] for each in yaml.safe_load_all(text)}


def encrypt(values: Values, file: Path, recipients: Sequence[str], sops: Path) -> None:
    """Write the values to a file, readable by the recipients only.

    Args:
        values: What to encrypt.
        file: What to write; it changes in one step.
        recipients: Public age keys.
        sops: The program.
    """
    done = subprocess.run(
        [
            *(str(sops), "encrypt"),
            *("--age", ",".join(recipients), "--encrypted-regex", _ENCRYPTED),
            *("--input-type", "yaml", "--output-type", "yaml"),
            *("--filename-override", file.name),
        ],
        input=documents(values).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    draft = file.with_suffix(".draft")
    draft.write_bytes(done.stdout)
    draft.replace(file)


def decrypt(file: Path, sops: Path) -> dict[str, dict[str, str]]:
    """Return the values of a file, with a key of SOPS_AGE_KEY_FILE.

    Raises:
        subprocess.CalledProcessError: No key fits.
    """
    done = subprocess.run(
        [str(sops), "decrypt", str(file)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return values_of(done.stdout.decode())


def recipients_of(environment: str, directory: Path) -> list[str]:
    """Return the public keys of those who may read the secrets of an environment.

    Raises:
        FileNotFoundError: Nobody has been named yet.
    """
    lines = (directory / f"{environment}.recipients").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def problems_of(directory: Path) -> Iterator[str]:
    """Yield what is wrong with the files of secrets."""
    for file in sorted(directory.glob("*")):
        if file.name.endswith(".enc.yaml"):
            yield from _problems_of_file(file)
        elif file.suffix in {".yaml", ".yml", ".json", ".env"}:
            yield f"{file.name}: is not encrypted: only *.enc.yaml belongs here"


def plain(files: Iterable[Path]) -> Iterator[str]:
    """Yield the files that hold a key, or a Secret of Kubernetes that is not encrypted."""
    for file in files:
        text = file.read_bytes()
        if any(mark in text for mark in _MARKS):
            yield f"{file}: holds a private key"
        if file.suffix in {".yaml", ".yml"} and _SECRET.search(text) and b"\nsops:" not in text:
            yield f"{file}: is a Secret that everybody can read"


def _problems_of_file(file: Path) -> Iterator[str]:
    environment = file.name.removesuffix(".enc.yaml")
    allowed = set(recipients_of(environment, file.parent))
    for document in yaml.safe_load_all(file.read_text()):
        able = {each["recipient"] for each in document.get("sops", {}).get("age", ())}
        if able != allowed:
            yield f"{file.name}: can be read by others than {environment}.recipients names"
        secret = document["metadata"]["name"]
        for key, value in _values(document).items():
            if value == "":
                yield f"{file.name}: {secret}/{key} was never filled in: sops edit {file.name}"
            elif not value.startswith("ENC["):
                yield f"{file.name}: {secret}/{key} is not encrypted"


def _values(document: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: str(value)
        for part in ("data", "stringData")
        for key, value in document.get(part, {}).items()
    }


def _kind(keys: Mapping[str, str]) -> str:
    return "kubernetes.io/basic-auth" if set(keys) == {"username", "password"} else "Opaque"


def _url(role: str, passwords: Mapping[str, str], database: str = "kimberly") -> str:
    # With the namespace: KEDA counts in it from another one.
    return f"postgresql://{role}:{passwords[role]}@postgres.{NAMESPACE}.svc:5432/{database}"


def _backup(database_url: str) -> dict[str, dict[str, str]]:
    """Return the secrets of backups; the keys of their bucket come from elsewhere."""
    identity = x25519.Identity.generate()
    keys = ("access-key", "secret-key", "erasures-access-key", "erasures-secret-key")
    return {
        "backup": {
            "database-url": database_url,
            "recipients": str(identity.to_public()),
            **dict.fromkeys(keys, ""),
        },
        "backup-identity": {"identity": f"{identity}\n"},
    }


def _access_list(password: str) -> str:
    digest = hashlib.sha256(password.encode()).hexdigest()
    may = f"~{KEY_PREFIX}* &{KEY_PREFIX}* +@all -@dangerous"
    return f"user default off\nuser {_REDIS_USER} on #{digest} {may}\n"


def _password() -> str:
    return secrets.token_hex(24)


def _master_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()
