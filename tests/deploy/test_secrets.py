"""Secrets are made, encrypted, read back, rotated, and never left in the open. With real SOPS."""

import subprocess
from collections.abc import Callable
from pathlib import Path

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

from deploy import rendering, secrets
from deploy.__main__ import app
from local.servers import KEY_PREFIX, VALKEY_USER
from server.backup.signing import Signer
from server.kms.local import LocalKms
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM, Role

SOPS = rendering.TOOLS / "sops"
pytestmark = pytest.mark.skipif(not SOPS.exists(), reason="make build/deploy/installed brings sops")

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


def test_a_key_or_a_plain_secret_anywhere_is_said(tmp_path: Path) -> None:
    files = {
        "key.txt": "AGE-SECRET" + "-KEY-1QQQQ",
        "tls.pem": "-----BEGIN " + "PRIVATE KEY-----",
        "secret.yaml": secrets.documents(secrets.new_values("local")),
        "fine.yaml": "kind: Deployment\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    said = list(secrets.plain(sorted(tmp_path.iterdir())))
    assert [Path(each.split(":")[0]).name for each in said] == [
        "key.txt",
        # It is one, and holds the key that opens backups.
        "secret.yaml",
        "secret.yaml",
        "tls.pem",
    ]


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
    assert changed == {"backup", "database", "database-owner", "database-superuser"}
    backup = rotated["backup"]
    assert backup["database-url"] != values["backup"]["database-url"]
    assert backup["recipients"] == values["backup"]["recipients"]
    superuser = rotated["database-superuser"]["password"]
    assert rotated["database-owner"]["superuser-password"] == superuser
    assert f":{superuser}@" in rotated["database-owner"]["superuser-url"]


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


def test_what_is_not_ours_is_not_rotated() -> None:
    with pytest.raises(KeyError):
        secrets.rotated(secrets.new_values("staging"), "dns")


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
