"""The local authority: what it signs, what it keeps on disk, and when it signs again."""

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from local.certificates import (
    LEAF_LIFETIME,
    Authority,
    KeyPair,
    Names,
    current,
    make_leaf,
    make_root,
    renewal_due,
)

NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
MEMORY = Names("spiffe://kimberly.local/ns/local/sa/memory")
PUBLIC = Names(dns_names=("localhost",), addresses=("127.0.0.1",))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "certificates", now=NOW)


def leaf_of(authority: Authority, name: str) -> x509.Certificate:
    leaf = current(authority.identity(name))
    assert leaf is not None
    return leaf


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_public_certificate_verifies_against_the_bundle(authority: Authority) -> None:
    authority.issue("public", PUBLIC, now=NOW)
    root = x509.load_pem_x509_certificate(authority.bundle.read_bytes())
    verifier = PolicyBuilder().store(Store([root])).time(NOW)
    chain = verifier.build_server_verifier(x509.DNSName("localhost")).verify(
        leaf_of(authority, "public"), []
    )
    assert chain[-1] == root


def test_a_workload_is_client_and_server_and_a_public_server_is_no_client(
    authority: Authority,
) -> None:
    authority.issue("memory", MEMORY, now=NOW)
    authority.issue("public", PUBLIC, now=NOW)
    usages = {
        name: set(
            leaf_of(authority, name).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        )
        for name in ("memory", "public")
    }
    assert usages["memory"] == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert usages["public"] == {ExtendedKeyUsageOID.SERVER_AUTH}


def test_a_leaf_names_its_workload_and_nothing_else(authority: Authority) -> None:
    authority.issue("memory", MEMORY, now=NOW)
    extensions = leaf_of(authority, "memory").extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [MEMORY.spiffe_id]
    assert extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_keys_are_readable_by_their_owner_only(authority: Authority) -> None:
    directory = authority.issue("memory", MEMORY, now=NOW)
    assert mode_of(authority.directory / "ca.key") == 0o600
    assert mode_of(directory / "current" / "tls.key") == 0o600
    assert mode_of(directory) == 0o700


def test_key_and_certificate_of_a_generation_belong_together(authority: Authority) -> None:
    files = authority.issue("memory", MEMORY, now=NOW) / "current"
    pair = KeyPair.read(files / "tls.crt", files / "tls.key")
    assert pair.key.public_key() == pair.certificate.public_key()


def test_an_authority_opened_again_is_the_same(authority: Authority) -> None:
    again = Authority.open(authority.directory, now=NOW + dt.timedelta(days=300))
    assert again.root.certificate == authority.root.certificate


def test_an_authority_that_is_used_up_is_replaced(authority: Authority) -> None:
    end = authority.root.certificate.not_valid_after_utc
    again = Authority.open(authority.directory, now=end - dt.timedelta(hours=1))
    assert again.root.certificate != authority.root.certificate


def test_a_good_leaf_is_used_again(authority: Authority) -> None:
    authority.ensure("memory", MEMORY, now=NOW)
    first = leaf_of(authority, "memory")
    authority.ensure("memory", MEMORY, now=NOW + dt.timedelta(hours=11))
    assert leaf_of(authority, "memory") == first


def test_a_leaf_is_renewed_at_half_its_life(authority: Authority) -> None:
    authority.ensure("memory", MEMORY, now=NOW)
    first = leaf_of(authority, "memory")
    assert not renewal_due(first, now=NOW + dt.timedelta(hours=11))
    assert renewal_due(first, now=NOW + LEAF_LIFETIME / 2)
    authority.ensure("memory", MEMORY, now=NOW + LEAF_LIFETIME / 2)
    assert leaf_of(authority, "memory") != first


def test_a_leaf_for_other_names_is_replaced(authority: Authority) -> None:
    authority.ensure("public", PUBLIC, now=NOW)
    first = leaf_of(authority, "public")
    authority.ensure("public", Names(dns_names=("kimberly.example",)), now=NOW)
    assert leaf_of(authority, "public") != first


def test_a_leaf_of_another_authority_is_replaced(authority: Authority, tmp_path: Path) -> None:
    authority.ensure("memory", MEMORY, now=NOW)
    first = leaf_of(authority, "memory")
    root = make_root("another", now=NOW)
    stranger = Authority(authority.directory, root, (root.certificate,))
    stranger.ensure("memory", MEMORY, now=NOW)
    assert leaf_of(authority, "memory") != first


def test_the_generation_before_stays_and_older_ones_go(authority: Authority) -> None:
    for _ in range(4):
        directory = authority.issue("memory", MEMORY, now=NOW)
    assert sorted(path.name for path in directory.glob("gen-*")) == ["gen-3", "gen-4"]
    assert (directory / "current").readlink() == Path("gen-4")


def test_a_hostile_certificate_can_be_made_for_tests() -> None:
    yesterday = NOW - dt.timedelta(days=1)
    expired = make_leaf(
        make_root("x", now=yesterday), MEMORY, now=yesterday, lifetime=dt.timedelta(hours=1)
    )
    assert expired.certificate.not_valid_after_utc < NOW


# --- another authority --------------------------------------------------------------------------


def trusted_by(authority: Authority, name: str) -> set[int]:
    pem = (authority.identity(name) / "current" / "ca.crt").read_bytes()
    return {each.serial_number for each in x509.load_pem_x509_certificates(pem)}


def test_an_authority_takes_over_in_steps_that_survive_a_restart(authority: Authority) -> None:
    def reopened() -> Authority:
        opened = Authority.open(authority.directory, now=NOW)
        opened.ensure("memory", MEMORY, now=NOW)
        return opened

    old = authority.root.certificate
    reopened()
    authority.publish(now=NOW)
    published = reopened()
    # Trusted, but nothing is signed by it yet.
    assert published.root.certificate == old
    assert len(trusted_by(published, "memory")) == 2
    leaf_of(published, "memory").verify_directly_issued_by(old)

    published.sign()
    signing = reopened()
    new = signing.root.certificate
    assert new != old
    assert trusted_by(signing, "memory") == {old.serial_number, new.serial_number}
    leaf_of(signing, "memory").verify_directly_issued_by(new)

    signing.withdraw()
    assert trusted_by(reopened(), "memory") == {new.serial_number}
    assert x509.load_pem_x509_certificates(authority.bundle.read_bytes()) == [new]


def test_an_authority_that_is_published_anew_forgets_the_one_that_was_to_come(
    authority: Authority,
) -> None:
    first = authority.publish(now=NOW)
    second = first.publish(now=NOW)
    assert len(second.trusted) == 2
    assert second.sign().root.certificate in second.trusted


def test_nothing_signs_that_was_not_published(authority: Authority) -> None:
    with pytest.raises(FileNotFoundError):
        authority.sign()
    with pytest.raises(FileNotFoundError):
        authority.publish(now=NOW).withdraw().sign()


def test_a_key_of_nobody_who_is_trusted_signs_nothing(authority: Authority, tmp_path: Path) -> None:
    other = Authority.open(tmp_path / "other", now=NOW)
    (other.directory / "ca.key").replace(authority.directory / "ca.key")
    with pytest.raises(ValueError, match="no certificate that is trusted"):
        Authority.open(authority.directory, now=NOW)
