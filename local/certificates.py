"""The local certificate authority, and the files from which every Envoy reads its identity.

An identity is a directory that Envoy watches:

    identity.json  trust.json          SDS resources; they name the files below and never change
    current -> gen-7                   swapped in one rename, so key, chain and CA are read together
    gen-7/tls.crt  tls.key  ca.crt     the same names that cert-manager mounts

Another authority takes over in three steps, between which everybody gets time to notice: it is
published beside the one that signs, it signs, and the one before is withdrawn. `ca.pem` holds what
is trusted, and `ca.key` says which of them signs.
"""

import contextlib
import datetime as dt
import fcntl
import ipaddress
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ROOT_LIFETIME = dt.timedelta(days=3650)
LEAF_LIFETIME = dt.timedelta(hours=24)
_ROOT_NAME = "Kimberly local authority"
CLOCK_SKEW = dt.timedelta(minutes=5)
"""Certificates begin this much before they are made: the clocks of two machines differ."""


@dataclass(frozen=True, slots=True)
class Names:
    """Whom a leaf certificate names: a workload of the mesh, or a public server."""

    spiffe_id: str | None = None
    dns_names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def alternatives(self) -> list[x509.GeneralName]:
        """Return the names as they stand in a certificate."""
        uris = [x509.UniformResourceIdentifier(self.spiffe_id)] if self.spiffe_id else []
        dns = [x509.DNSName(name) for name in self.dns_names]
        ips = [x509.IPAddress(ipaddress.ip_address(address)) for address in self.addresses]
        return [*uris, *dns, *ips]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key in PEM (PKCS #8, not encrypted)."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @classmethod
    def read(cls, certificate: Path, key: Path) -> "KeyPair":
        """Read both from PEM files.

        Raises:
            OSError: a file is missing.
            ValueError: a file holds something else.
        """
        return cls.parse(certificate.read_bytes(), key.read_bytes())

    @classmethod
    def parse(cls, certificate: bytes, key: bytes) -> "KeyPair":
        """Read both from PEM.

        Raises:
            ValueError: one is something else.
        """
        return cls(x509.load_pem_x509_certificate(certificate), _private_key(key))


def make_root(
    common_name: str, *, now: dt.datetime, lifetime: dt.timedelta = ROOT_LIFETIME
) -> KeyPair:
    """Return a new self-signed authority that may sign leaves but no further authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(common_name)
    builder = (
        _builder(name, name, key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return KeyPair(builder.sign(key, hashes.SHA256()), key)


def make_leaf(
    root: KeyPair, names: Names, *, now: dt.datetime, lifetime: dt.timedelta = LEAF_LIFETIME
) -> KeyPair:
    """Return a new key and a certificate for it, signed by `root`.

    A certificate with a SPIFFE id serves as client and as server; one without is a server's only.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH]
    if names.spiffe_id:
        usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    builder = (
        _builder(x509.Name([]), root.certificate.subject, key.public_key(), now, lifetime)
        # Critical because the subject is empty (RFC 5280 §4.2.1.6).
        .add_extension(x509.SubjectAlternativeName(names.alternatives()), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(_issuer_key_id(root.certificate), critical=False)
    )
    return KeyPair(builder.sign(root.key, hashes.SHA256()), key)


def renewal_due(certificate: x509.Certificate, *, now: dt.datetime) -> bool:
    """Tell whether half of a certificate's life is over."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) / 2


@dataclass(frozen=True, slots=True)
class Authority:
    """The certificate authority of one mesh, and the identities that it issued."""

    directory: Path
    root: KeyPair
    trusted: tuple[x509.Certificate, ...]
    """The certificate of the root, and of who signs next or signed before."""

    @classmethod
    def open(cls, directory: Path, *, now: dt.datetime) -> "Authority":
        """Return the authority kept in `directory`; make one if there is none or it is used up.

        Raises:
            ValueError: the key belongs to no certificate that is trusted.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            trusted = x509.load_pem_x509_certificates((directory / "ca.pem").read_bytes())
            root = _pair(trusted, directory / "ca.key")
            if root.certificate.not_valid_after_utc > now + LEAF_LIFETIME:
                return cls(directory, root, tuple(trusted))
        root = make_root(_ROOT_NAME, now=now)
        _write(directory / "ca.key", root.key_pem, mode=0o600)
        _write(directory / "ca.pem", root.certificate_pem, mode=0o644)
        return cls(directory, root, (root.certificate,))

    # --- another root ---------------------------------------------------------------------------

    def publish(self, *, now: dt.datetime) -> "Authority":
        """Make the root that is to sign next, and trust it already."""
        following = make_root(_ROOT_NAME, now=now)
        _write(self.directory / "next.key", following.key_pem, mode=0o600)
        return self._trust(self.root, following.certificate)

    def sign(self) -> "Authority":
        """Let the root that was published sign from now on.

        Raises:
            FileNotFoundError: none was published.
        """
        following = _pair(self.trusted, self.directory / "next.key")
        (self.directory / "next.key").replace(self.directory / "ca.key")
        return replace(self, root=following)

    def withdraw(self) -> "Authority":
        """Trust nothing any more but what the root signs."""
        (self.directory / "next.key").unlink(missing_ok=True)
        return self._trust(self.root)

    def _trust(self, root: KeyPair, *others: x509.Certificate) -> "Authority":
        trusted = (root.certificate, *others)
        _write(self.bundle, _pem(trusted), mode=0o644)
        return replace(self, trusted=trusted)

    # --- identities -----------------------------------------------------------------------------

    @property
    def bundle(self) -> Path:
        """The file that clients such as curl and grpcurl trust."""
        return self.directory / "ca.pem"

    def identity(self, name: str) -> Path:
        """Return the directory of an identity: what a rendered Envoy calls its `sds`."""
        return self.directory / name

    def ensure(
        self,
        name: str,
        names: Names,
        *,
        now: dt.datetime,
        lifetime: dt.timedelta = LEAF_LIFETIME,
    ) -> Path:
        """Issue an identity unless the one on disk is good for at least half its life.

        Call it at start and then now and again: it is what renews certificates.
        """
        if not self._is_good(name, names, now):
            self.issue(name, names, now=now, lifetime=lifetime)
        return self.identity(name)

    def issue(
        self,
        name: str,
        names: Names,
        *,
        now: dt.datetime,
        lifetime: dt.timedelta = LEAF_LIFETIME,
    ) -> Path:
        """Issue an identity anew and make it current. Return its directory."""
        return activate(
            self.identity(name),
            make_leaf(self.root, names, now=now, lifetime=lifetime),
            trusted=self.trusted,
        )

    def _is_good(self, name: str, names: Names, now: dt.datetime) -> bool:
        leaf = current(self.identity(name))
        return (
            leaf is not None
            and not renewal_due(leaf, now=now)
            and leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            == x509.SubjectAlternativeName(names.alternatives())
            and _is_signed_by(leaf, self.root.certificate)
            and (self.identity(name) / "current" / "ca.crt").read_bytes() == _pem(self.trusted)
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from changing an authority and its identities meanwhile."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def current(directory: Path) -> x509.Certificate | None:
    """Return the current certificate of an identity, or None if there is none."""
    try:
        return x509.load_pem_x509_certificate((directory / "current" / "tls.crt").read_bytes())
    except FileNotFoundError:
        return None


def activate(directory: Path, leaf: KeyPair, *, trusted: Sequence[x509.Certificate]) -> Path:
    """Write `leaf` and what it trusts as a new generation of an identity and swap it in.

    Envoy answers to moves only, and reads all files again after one. The generation before stays,
    because Envoy may be reading it right now; older ones go.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in sds_resources(directory, directory / "current").items():
        _write(directory / name, text.encode(), mode=0o600)
    number = max(_generations(directory), default=0) + 1
    generation = directory / f"gen-{number}"
    generation.mkdir(mode=0o700)
    _write(generation / "tls.crt", leaf.certificate_pem, mode=0o644)
    _write(generation / "tls.key", leaf.key_pem, mode=0o600)
    _write(generation / "ca.crt", _pem(trusted), mode=0o644)
    _swap(directory, generation)
    for old in _generations(directory):
        if old < number - 1:
            shutil.rmtree(directory / f"gen-{old}")
    return directory


def sds_resources(watched: Path, files: Path) -> dict[str, str]:
    """Return the SDS files by name, for tls.crt, tls.key and ca.crt in `files`.

    `watched` is the directory in which a move means that those files changed: for a Kubernetes
    secret it is the mount itself.
    """
    watch = {"path": str(watched)}
    identity = {
        "certificate_chain": {"filename": str(files / "tls.crt")},
        "private_key": {"filename": str(files / "tls.key")},
        "watched_directory": watch,
    }
    trust = {"trusted_ca": {"filename": str(files / "ca.crt")}, "watched_directory": watch}
    return {
        "identity.json": _sds("identity", {"tls_certificate": identity}),
        "trust.json": _sds("trust", {"validation_context": trust}),
    }


def _sds(name: str, secret: dict[str, object]) -> str:
    kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
    return json.dumps({"resources": [{"@type": kind, "name": name, **secret}]}, indent=2)


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def _pair(certificates: Sequence[x509.Certificate], file: Path) -> KeyPair:
    key = _private_key(file.read_bytes())
    for certificate in certificates:
        if certificate.public_key() == key.public_key():
            return KeyPair(certificate, key)
    raise ValueError(f"{file} belongs to no certificate that is trusted")


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    private = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key")  # noqa: TRY004 - the file is wrong
    return private


def _generations(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("gen-")) for path in directory.glob("gen-*")]


def _swap(directory: Path, generation: Path) -> None:
    link = directory / ".current"
    link.unlink(missing_ok=True)
    link.symlink_to(generation.name)
    link.replace(directory / "current")


def _write(path: Path, content: bytes, *, mode: int) -> None:
    # Created with its final mode: a key must not be readable by others even for a moment.
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    draft.replace(path)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    lifetime: dt.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        # Envoy refuses a leaf whose key usage lacks this one.
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_key_id(root: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


def _is_signed_by(leaf: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError):
        return False
    return True
