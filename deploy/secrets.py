"""The secrets of an environment: which there are, how they are made, and how they are kept.

Kept means encrypted by SOPS to the age keys of those who may read them. What is listed here is what
the manifests may refer to; production has the same names in Vault.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml
from pyrage import x25519

from local.certificates import make_root
from local.layout import CHECKOUT
from server.backup.signing import Signer
from server.cache import KEY_PREFIX
from server.clock import utc_now
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM

Values = Mapping[str, Mapping[str, str]]
"""Values by the name of the secret and the key in it."""

NAMESPACE: Final = "kimberly"
DIRECTORY: Final = CHECKOUT / "secrets"
TO_BE_GIVEN: Final = {
    "dns": ("api-token",),
    "mails": ("smtp-password",),
    "alerts": ("smtp-password",),
}
"""What comes from elsewhere and stays empty until somebody fills it in with `sops edit`."""
BACKUPS_INSIDE: Final = ("local",)
"""Environments whose backups lie in their own object store: to try things out."""
REPLICATED: Final = ("staging",)
"""Environments whose database has standbys: backups read from one of those."""
STORES_OUTSIDE: Final = ("fly", "free")
"""Environments whose object store is not ours: its keys come from there."""
TELLING_NOBODY: Final = ("fly", "free", "local")
"""Environments without Alertmanager, which would mail alerts."""
WRITING_TO_NOBODY: Final = ("local",)
"""Environments without a carrier of mails."""
WITHOUT_ISSUER: Final = ("fly",)
"""Environments where no operator issues certificates: `deploy.fly` does, by the authority here, and
the certificate that clients see comes from elsewhere."""
MAY_BE_EMPTY: Final = ("edge-public",)
"""What comes from elsewhere, and is made by us for those who try things out."""
_URLS: Final = {
    APPLICATION: ("database", "application-url"),
    SYSTEM: ("database", "system-url"),
    OWNER: ("database-owner", "owner-url"),
    BACKUP: ("backup", "database-url"),
}
"""Where the password of a role is that the migration job looks after."""
_OURS: Final = {"redis": "users.acl", "s3": "s3.json"}
"""Stores that the secret itself tells whom to let in, where they are ours, and by which key."""
_SUPERUSER: Final = "postgres"
_REDIS_USER: Final = "mesh"
_ENCRYPTED: Final = "^(data|stringData)$"
# Put together here, so that this file is none that holds them.
_AGE: Final = "AGE-SECRET" + "-KEY-1"
_LOOKS: Final = (
    ("holds a private key", re.compile(_AGE.encode())),
    (
        "holds a private key",
        re.compile(rb"-----BEGIN (RSA |EC |DSA |OPENSSH |ENCRYPTED )?PRIV" + rb"ATE KEY-----"),
    ),
    ("holds an API key of ours", re.compile(rb"\bkim_[0-9a-f]{10}_[\w-]{43}")),
    (
        "holds a password in a URL",
        # What a shell, a template or an f-string fills in is none.
        re.compile(rb"\b[a-z][a-z0-9+.-]+://[^\s/:@\"'<>{}$]*:[^\s/:@\"'<>{}$]{8,}@"),
    ),
)
"""What gives a secret away, whatever file it is in."""
_SECRET: Final = re.compile(
    rb"""(^|[\s{,-])["']?kind["']?\s*:\s*["']?Secret["']?\s*(,|}|\#|$)""", re.MULTILINE
)
_DATA: Final = re.compile(rb"""\b(data|stringData)["']?\s*:""")


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
        "key": {"master.key": f"{_key()}\n"},
        **_backup(_url(BACKUP, passwords, host=_backed_up(environment))),
    }
    if environment in BACKUPS_INSIDE:
        for whose in ("", "erasures-"):
            made["backup"] |= {f"{whose}access-key": access_key, f"{whose}secret-key": secret_key}
    if environment in STORES_OUTSIDE:
        made["s3"] = {"access-key": "", "secret-key": ""}
    given = {name: dict.fromkeys(keys, "") for name, keys in TO_BE_GIVEN.items()}
    if environment in TELLING_NOBODY:
        del given["alerts"]
    if environment in WRITING_TO_NOBODY:
        del given["mails"]
    if environment in WITHOUT_ISSUER:
        root = make_root("Kimberly", now=utc_now())
        pair = {"ca.crt": root.certificate_pem.decode(), "ca.key": root.key_pem.decode()}
        made["authority"] = pair
        del given["dns"]
        given["edge-public"] = {"tls.crt": "", "tls.key": ""}
    return made | given


def rotated(values: Values, name: str) -> dict[str, dict[str, str]]:
    """Return the values of an environment with one secret made anew.

    A new master key goes below the old ones: what those wrapped is still to be read. The roles of
    the database follow at the next migration job, which sets their passwords; its superuser does
    where an operator looks after it, and has to be told elsewhere.

    Raises:
        KeyError: There is no such secret, or its other half is not in the cluster.
    """
    changed = {each: dict(keys) for each, keys in values.items()}
    fresh = new_values("")
    if name == "database":
        for secret, key in _URLS.values():
            changed[secret][key] = _with_password(values[secret][key], _password())
    elif name == "database-superuser":
        password, owner = _password(), changed["database-owner"]
        changed[name]["password"] = owner["superuser-password"] = password
        owner["superuser-url"] = _with_password(owner["superuser-url"], password)
    elif name == "key":
        changed[name]["master.key"] += fresh[name]["master.key"]
    elif name == "backup-identity":
        # What the old keys sealed is to be opened for as long as it is kept.
        changed[name]["identity"] += fresh[name]["identity"]
        changed["backup"]["recipients"] = fresh["backup"]["recipients"]
    elif name == "backup-signing":
        # What the old key signed is to be believed for as long as it is kept.
        signers = f"{values[name]['signers']} {fresh[name]['signers']}"
        changed[name] = {**fresh[name], "signers": signers}
    elif _OURS.get(name, "") in values.get(name, {}):
        changed[name] = {key: fresh[name][key] for key in values[name]}
    else:
        raise KeyError(name)
    return changed


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


def own_keys() -> list[str]:
    """Return the public age keys of whoever runs this, as SOPS finds them; make one if none is."""
    configured = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    usual = Path(configured) / "sops" / "age" / "keys.txt"
    file = Path(os.environ.get("SOPS_AGE_KEY_FILE") or usual)
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(f"{x25519.Identity.generate()}\n")
    lines = file.read_text().splitlines()
    keys = [line.strip() for line in lines if line.startswith(_AGE)]
    return [str(x25519.Identity.from_str(key).to_public()) for key in keys]


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
    """Yield the files that hold a key, a password, or a Secret of Kubernetes in the open."""
    for file in files:
        text = file.read_bytes()
        yield from (f"{file}: {what}" for what, look in _LOOKS if look.search(text))
        is_open = file.suffix in {".yaml", ".yml", ".json"} and b"\nsops:" not in text
        if is_open and _SECRET.search(text) and _DATA.search(text):
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
            if value == "" and secret in MAY_BE_EMPTY:
                continue
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


def _url(
    role: str, passwords: Mapping[str, str], database: str = "kimberly", host: str = "postgres"
) -> str:
    # With the namespace: KEDA counts in it from another one.
    return f"postgresql://{role}:{passwords[role]}@{host}.{NAMESPACE}.svc:5432/{database}"


def _backed_up(environment: str) -> str:
    """Return the service behind which the database is read for backups."""
    # The operator makes it: any standby.
    return "postgres-ro" if environment in REPLICATED else "postgres"


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    netloc = f"{parts.username}:{password}@{parts.netloc.rpartition('@')[2]}"
    return parts._replace(netloc=netloc).geturl()


def _backup(database_url: str) -> dict[str, dict[str, str]]:
    """Return the secrets of backups; the keys of their bucket come from elsewhere."""
    identity, signing_key = x25519.Identity.generate(), _key()
    keys = ("access-key", "secret-key", "erasures-access-key", "erasures-secret-key")
    return {
        "backup": {
            "database-url": database_url,
            "recipients": str(identity.to_public()),
            **dict.fromkeys(keys, ""),
        },
        "backup-identity": {"identity": f"{identity}\n"},
        "backup-signing": {"key": signing_key, "signers": Signer(signing_key).public},
    }


def _access_list(password: str) -> str:
    digest = hashlib.sha256(password.encode()).hexdigest()
    may = f"~{KEY_PREFIX}* &{KEY_PREFIX}* +@all -@dangerous"
    return f"user default off\nuser {_REDIS_USER} on #{digest} {may}\n"


def _password() -> str:
    return secrets.token_hex(24)


def _key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()
