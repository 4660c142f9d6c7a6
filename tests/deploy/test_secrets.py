"""Secrets are made, encrypted, read back, rotated, and never left in the open. With real SOPS."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from pyrage import x25519
from typer.testing import CliRunner

from deploy import rendering, secrets, vault
from deploy.__main__ import app
from local.servers import KEY_PREFIX, VALKEY_USER
from server.backup.signing import Signer
from server.kms.local import LocalKms
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM, Role
from tests.needs import needs_kustomize

SOPS = rendering.TOOLS / "sops"
pytestmark = needs_kustomize

BUCKET_KEYS = ("access-key", "secret-key", "erasures-access-key", "erasures-secret-key")
# Keys of nobody: they open what these tests encrypt and nothing else.
ANN = "age1u654jw2y8tuq3lh45dr799r6jjyetsc7vsqack9608sx3pvtnseq58y2uy"
BOB = "age1fdn026yp4a04ttpq8qp04wdp52n03l0clmw5tdne9npgrn9anvzsgtn28f"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "staging.recipients").write_text(f"{ANN}  # Ann\n\n# {BOB}\n")
    monkeypatch.setattr(secrets, "DIRECTORY", tmp_path)
    return tmp_path


def test_nothing_of_a_value_is_left_in_the_file(directory: Path) -> None:
    values = secrets.new_values("staging")
    file = directory / "staging.enc.yaml"
    secrets.encrypt(values, file, [ANN], SOPS)
    text = file.read_text()
    given = [value for keys in values.values() for value in keys.values() if value]
    assert not [value for value in given if value in text]
    assert [document["metadata"]["name"] for document in yaml.safe_load_all(text)] == list(values)


def test_what_was_never_filled_in_is_said(directory: Path) -> None:
    secrets.encrypt(secrets.new_values("free"), directory / "staging.enc.yaml", [ANN], SOPS)
    said = list(secrets.problems_of(directory))
    assert [each.split(" ")[1] for each in said] == [
        "s3/access-key",
        "s3/secret-key",
        *(f"backup/{key}" for key in BUCKET_KEYS),
        "dns/api-token",
        "mails/smtp-password",
    ]


def test_without_a_certificate_of_their_own_the_machines_of_fly_get_one_of_ours(
    directory: Path,
) -> None:
    (directory / "fly.recipients").write_text(f"{ANN}\n")
    secrets.encrypt(secrets.new_values("fly"), directory / "fly.enc.yaml", [ANN], SOPS)
    said = list(secrets.problems_of(directory))
    assert [each.split(" ")[1] for each in said] == [
        "s3/access-key",
        "s3/secret-key",
        *(f"backup/{key}" for key in BUCKET_KEYS),
        "mails/smtp-password",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("ENC[", "PLAIN["), "is not encrypted"),
        (lambda text: text.replace(ANN, BOB), "can be read by others than staging.recipients"),
    ],
)
def test_what_others_can_read_is_said(
    directory: Path, change: Callable[[str], str], said: str
) -> None:
    file = directory / "staging.enc.yaml"
    secrets.encrypt(secrets.new_values("staging"), file, [ANN], SOPS)
    expected = len(secrets.TO_BE_GIVEN) + len(BUCKET_KEYS)
    assert len(list(secrets.problems_of(directory))) == expected
    file.write_text(change(file.read_text()))
    assert any(said in each for each in secrets.problems_of(directory))


def test_a_plain_file_among_the_secrets_is_said(directory: Path) -> None:
    (directory / "staging.yaml").write_text(secrets.documents(secrets.new_values("staging")))
    assert list(secrets.problems_of(directory)) == [
        "staging.yaml: is not encrypted: only *.enc.yaml belongs here"
    ]


PLAIN = {
    "age.txt": ("AGE-SECRET" + "-KEY-1QQQQ", "holds a private key"),
    "tls.pem": ("-----BEGIN " + "PRIVATE KEY-----", "holds a private key"),
    "ssh": ("-----BEGIN " + "OPENSSH PRIVATE KEY-----", "holds a private key"),
    "call.sh": (f"curl -H 'x-api-key: kim_{'0a' * 5}_{'-' * 43}'", "holds an API key of ours"),
    "settings.env": (
        f"DATABASE=postgresql://app:{'x' * 8}@db/app",
        "holds a password in a URL",
    ),
    "cache.py": (f'url = "redis://:{"x" * 24}@cache:6379/0"', "holds a password in a URL"),
    "secret.yaml": ("kind: Secret\ndata: {a: YQ==}", "is a Secret that everybody can read"),
    "list.yml": (
        "items:\n- apiVersion: v1\n  kind: 'Secret' # one of two\n  stringData: {a: b}",
        "is a Secret that everybody can read",
    ),
    "flow.yaml": (
        "{apiVersion: v1, kind: Secret, data: {a: YQ==}}",
        "is a Secret that everybody can read",
    ),
    "secret.json": ('{"kind":"Secret","data":{"a":"YQ=="}}', "is a Secret that everybody can read"),
}
"""What gives a secret away, by the file that it is in."""
FINE = {
    "deployment.yaml": "kind: Deployment\ndata: x\n",
    "store.yaml": "secretStoreRef: {name: vault, kind: SecretStore}\ndata: []\n",
    "reference.yaml": "target: {kind: Secret, name: redis}\n",
    "encrypted.yaml": "kind: Secret\ndata: {a: x}\nsops: {}\n",
    "filled-in.sh": 'url="postgresql://app:$PASSWORD@db/app"',
    "filled-in.py": 'f"postgresql://app:{password}@db/app"',
    "page.md": "see https://example.com/a@b or ssh://git@host:22/x",
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_gives_a_secret_away_is_said_wherever_it_is(name: str, tmp_path: Path) -> None:
    text, said = PLAIN[name]
    (tmp_path / name).write_text(text)
    assert list(secrets.plain([tmp_path / name])) == [f"{tmp_path / name}: {said}"]


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_like_a_secret_may_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FINE[name])
    assert list(secrets.plain([tmp_path / name])) == []


def new_key(file: Path) -> str:
    """Write a private key of SSH, which age takes as well, and return the public one."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    file.touch(mode=0o600)
    file.write_bytes(private)
    public: bytes = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return public.decode()


def test_secrets_go_to_a_cluster_and_come_back(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the key reads, whoever does not reads nothing."""
    keys = tmp_path_factory.mktemp("keys")
    (directory / "staging.recipients").write_text(new_key(keys / "ann"))
    new_key(keys / "bob")
    monkeypatch.setenv("SOPS_AGE_SSH_PRIVATE_KEY_FILE", str(keys / "ann"))
    said = CliRunner().invoke(app, ["secrets", "new", "staging"])
    assert said.exit_code == 0, said.output
    assert CliRunner().invoke(app, ["secrets", "new", "staging"]).exit_code == 1
    file = directory / "staging.enc.yaml"
    before = secrets.decrypt(file, SOPS)
    assert before.keys() == secrets.new_values("staging").keys()
    assert CliRunner().invoke(app, ["secrets", "rotate", "staging", "redis"]).exit_code == 0
    after = secrets.decrypt(file, SOPS)
    assert {name for name in before if before[name] != after[name]} == {"redis"}
    monkeypatch.setenv("SOPS_AGE_SSH_PRIVATE_KEY_FILE", str(keys / "bob"))
    with pytest.raises(subprocess.CalledProcessError):
        secrets.decrypt(file, SOPS)


def test_an_environment_begins_from_nothing(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a key nor anybody who may read is there: who begins is the first."""
    key = tmp_path_factory.mktemp("home") / "age" / "keys.txt"
    monkeypatch.setenv("SOPS_AGE_KEY_FILE", str(key))
    for environment in ("local", "staging"):
        (directory / f"{environment}.recipients").unlink(missing_ok=True)
        said = CliRunner().invoke(app, ["secrets", "new", environment])
        assert said.exit_code == 0, said.output
        values = secrets.decrypt(directory / f"{environment}.enc.yaml", SOPS)
        assert values.keys() == secrets.new_values(environment).keys()
    assert "staging.enc.yaml: alerts/smtp-password was never filled in" in said.output
    assert (key.stat().st_mode & 0o777) == 0o600
    # One key, and both name it.
    (public,) = secrets.own_keys()
    assert secrets.recipients_of("local", directory) == [public]
    assert secrets.recipients_of("staging", directory) == [public]


def test_a_new_master_key_stands_below_the_old_one(tmp_path: Path) -> None:
    values = secrets.new_values("staging")
    rotated = secrets.rotated(values, "key")
    old, new = rotated["key"]["master.key"].splitlines()
    assert values["key"]["master.key"] == f"{old}\n"
    file = tmp_path / "master.key"
    file.touch(mode=0o600)
    file.write_text(rotated["key"]["master.key"])
    assert LocalKms(file)
    assert old != new


def test_the_passwords_of_the_database_change_together() -> None:
    values = secrets.new_values("staging")
    rotated = secrets.rotated(values, "database")
    changed = {name for name in values if values[name] != rotated[name]}
    assert changed == {"backup", "database", "database-owner"}
    backup = rotated["backup"]
    assert backup["database-url"] != values["backup"]["database-url"]
    assert backup["recipients"] == values["backup"]["recipients"]
    # The superuser's is another matter: nothing sets it in a database that is there.
    assert rotated["database-owner"]["superuser-url"] == values["database-owner"]["superuser-url"]


def test_the_superuser_changes_alone_wherever_it_is_named() -> None:
    values = secrets.new_values("staging")
    rotated = secrets.rotated(values, "database-superuser")
    changed = {name for name in values if values[name] != rotated[name]}
    assert changed == {"database-owner", "database-superuser"}
    superuser = rotated["database-superuser"]["password"]
    assert rotated["database-owner"]["superuser-password"] == superuser
    assert f":{superuser}@" in rotated["database-owner"]["superuser-url"]
    assert rotated["database-owner"]["owner-url"] == values["database-owner"]["owner-url"]


def test_a_database_stays_where_it_is_when_its_passwords_change() -> None:
    values = secrets.new_values("staging")
    elsewhere = "postgresql://kimberly_app:old@db.example:6432/mesh?sslmode=verify-full"
    values["database"]["application-url"] = elsewhere
    url = secrets.rotated(values, "database")["database"]["application-url"]
    assert url.endswith("@db.example:6432/mesh?sslmode=verify-full")
    assert Role.of_url(url, APPLICATION).password not in ("old", "")


def test_a_new_key_of_backups_stands_below_the_old_one_and_the_next_is_sealed_for_it() -> None:
    values = secrets.new_values("staging")
    rotated = secrets.rotated(values, "backup-identity")
    assert {name for name in values if values[name] != rotated[name]} == {
        "backup",
        "backup-identity",
    }
    old, new = rotated["backup-identity"]["identity"].splitlines()
    assert values["backup-identity"]["identity"] == f"{old}\n"
    assert rotated["backup"]["recipients"] == str(x25519.Identity.from_str(new).to_public())
    assert rotated["backup"]["database-url"] == values["backup"]["database-url"]


def test_a_new_signer_of_backups_stands_beside_the_old_one() -> None:
    values = secrets.new_values("staging")
    rotated = secrets.rotated(values, "backup-signing")["backup-signing"]
    old = values["backup-signing"]
    assert rotated["signers"] == f"{old['signers']} {Signer(rotated['key']).public}"
    assert rotated["key"] != old["key"]


@pytest.mark.parametrize(("environment", "name"), [("staging", "dns"), ("free", "s3")])
def test_what_is_not_ours_is_not_rotated(environment: str, name: str) -> None:
    with pytest.raises(KeyError):
        secrets.rotated(secrets.new_values(environment), name)


# --- Vault -------------------------------------------------------------------------------------

VAULT = f"""#!{sys.executable}
import json, os, pathlib, sys
kv, verb, mount, *options, path, = [a for a in sys.argv[1:] if a != "-"]
assert (kv, mount) == ("kv", "-mount=secret")
file = pathlib.Path(os.environ["VAULT"], path.partition("/")[2])
versions = json.loads(file.read_text())
if verb == "get":
    assert options == ["-format=json"]
    told = {{"data": versions[-1], "metadata": {{"version": len(versions)}}}}
    print(json.dumps({{"data": told}}))
elif options != [f"-cas={{len(versions)}}"]:
    sys.exit("check-and-set parameter did not match the current version")
else:
    file.write_text(json.dumps([*versions, json.load(sys.stdin)]))
"""
"""The program of Vault, which keeps versions as its engine does."""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Vault with the secrets of production, of which managed stores gave some."""
    program = tmp_path / "bin" / "vault"
    program.parent.mkdir()
    program.write_text(VAULT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VAULT", str(tmp_path))
    values = secrets.new_values("prod")
    for keys in values.values():
        keys.update({key: value.replace(HOST, "db.example") for key, value in keys.items()})
    del values["database-owner"]["superuser-password"]
    for name in vault.NAMES:
        (tmp_path / name).write_text(json.dumps([values[name]]))
    return tmp_path


HOST = "postgres.kimberly.svc"


def versions(directory: Path, name: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((directory / name).read_text())
    return found


def test_the_passwords_of_production_change_in_vault(kept: Path) -> None:
    before = vault.read()
    said = CliRunner().invoke(app, ["secrets", "rotate", "prod", "database"])
    assert said.exit_code == 0, said.output
    assert {name: len(versions(kept, name)) for name in vault.NAMES} == {
        "database": 2,
        "database-owner": 2,
        "backup": 2,
        "backup-identity": 1,
    }
    after = vault.read()
    for name, key in (("database", "system-url"), ("backup", "database-url")):
        assert after[name][key] != before[name][key]
        assert "@db.example:5432/" in after[name][key]
    assert after["database-owner"]["superuser-url"] == before["database-owner"]["superuser-url"]
    assert after["backup"]["recipients"] == before["backup"]["recipients"]


def test_what_a_provider_gives_is_not_made_here(kept: Path) -> None:
    said = CliRunner().invoke(app, ["secrets", "rotate", "prod", "redis"])
    assert said.exit_code == 1
    assert "redis is not ours to make" in said.output
    assert all(len(versions(kept, name)) == 1 for name in vault.NAMES)


def test_a_secret_that_somebody_else_just_changed_is_not_overwritten(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = vault._read

    def overtaken(name: str) -> dict[str, Any]:
        told = read(name)
        file = kept / name
        file.write_text(json.dumps([*versions(kept, name), {"by": "another"}]))
        return told

    monkeypatch.setattr(vault, "_read", overtaken)
    with pytest.raises(subprocess.CalledProcessError):
        vault.write("database", {"by": "us"})
    assert versions(kept, "database")[-1] == {"by": "another"}


def test_the_urls_name_the_roles_that_migrations_know() -> None:
    values = secrets.new_values("local")
    for url, role in (
        (values["database"]["application-url"], APPLICATION),
        (values["database"]["system-url"], SYSTEM),
        (values["database-owner"]["owner-url"], OWNER),
        (values["backup"]["database-url"], BACKUP),
    ):
        assert Role.of_url(url, role).password


def test_the_user_of_valkey_may_what_it_may_locally() -> None:
    access = secrets.new_values("local")["redis"]["users.acl"]
    assert access.startswith(f"user default off\nuser {VALKEY_USER} on #")
    assert f" ~{KEY_PREFIX}* &{KEY_PREFIX}* +@all -@dangerous" in access
