"""The auth process: accounts, tokens, users, privacy and plans."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import timedelta

import grpc
import structlog
from kimberly.auth.v1 import auth_pb2_grpc
from kimberly.billing.v1 import billing_pb2_grpc
from kimberly.privacy.v1 import privacy_pb2_grpc
from kimberly.users.v1 import users_pb2_grpc

from server.auth.access_tokens import Mint
from server.auth.api_key_store import ApiKeyStore
from server.auth.attempt_store import AttemptStore
from server.auth.breached import Breached, Commonplace, HashFile
from server.auth.endings import ConsentEndings
from server.auth.hash_costs import HashCosts
from server.auth.housekeeping import Housekeeping
from server.auth.issuing import Issuer
from server.auth.key_store import KeyStore
from server.auth.keyring import Keyring
from server.auth.mail import Mailer, Outbox, Smtp
from server.auth.mail_store import MailStore
from server.auth.member_store import MemberStore
from server.auth.membership_store import MembershipStore
from server.auth.metrics import AuthReadings
from server.auth.passwords import Passwords
from server.auth.postman import Postman
from server.auth.service import AuthService
from server.auth.session_store import SessionStore
from server.auth.sign_up_store import SignUpStore
from server.auth.store import AccountStore
from server.auth.tenant_service import TenantService
from server.billing.metrics import BillingReadings
from server.billing.payments import ManualPayments
from server.billing.service import BillingService
from server.billing.store import BillingStore
from server.clock import utc_now
from server.database import SystemDatabase
from server.erased import ErasedUsers
from server.metrics import Reading
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore
from server.privacy.export_store import ExportStore
from server.privacy.service import PrivacyService
from server.processes.parts import (
    Application,
    known_ended_grants,
    open_blobs,
    open_copies,
    open_databases,
    open_kms,
    open_toll,
    open_turnstile,
    patience,
)
from server.settings import Settings
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.audit_work_service import AuditWorkService
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from server.users.consent_store import ConsentStore
from server.users.metrics import AuditReadings
from server.users.service import UserService
from server.users.store import UserStore
from server.users.tenant_audits import TenantAudits
from server.users.withdrawal_archive import WithdrawalArchive

log = structlog.get_logger()


async def compose(settings: Settings, stack: AsyncExitStack) -> Application:
    """Return what the auth process serves; what it opened is closed with the stack."""
    database, system = await stack.enter_async_context(open_databases(settings, "auth"))
    kms, blobs = await open_kms(settings, stack), open_blobs(settings)
    keyring = Keyring(KeyStore(system), kms, access_token_seconds=settings.access_token_seconds)
    await keyring.ensure_signing_key()
    hashing = stack.enter_context(
        Passwords(concurrency=settings.password_hash_concurrency, breached=_breached(settings))
    )
    erasures = ErasureStore(system, patience(settings))
    attempts, mails, api_keys = AttemptStore(system), MailStore(system), ApiKeyStore(system)
    sign_ups, accounts = SignUpStore(system), AccountStore(system)
    costs = HashCosts(accounts, hashing)
    await costs.refresh()
    mailer = _mailer(settings)
    auth = AuthService(
        accounts,
        SessionStore(system),
        attempts,
        mails,
        api_keys,
        MembershipStore(system, erasures.begin_within),
        keyring,
        hashing,
        _issuer(settings, keyring),
        sign_ups=sign_ups,
        confirms_email=settings.sign_up_confirms_email,
        sends_mails=mailer is not None,
    )
    members = MemberStore(system, erasures.begin_within)
    tenants = TenantService(members)
    ended = await known_ended_grants(system)
    checkpoint_store = CheckpointStore(system)
    audit_keys = AuditKeys(checkpoint_store, kms)
    await audit_keys.signer()
    archive = CheckpointArchive(blobs, checkpoint_store, audit_keys)
    audit_log = AuditLog(AuditStore(system), archive, seal_seconds=settings.audit_seal_seconds)
    copies = open_copies(settings)
    consents = ConsentStore(system, ConsentEndings())
    withdrawals = WithdrawalArchive(
        consents, blobs, audit_keys.signer, audit_keys.known, copies=copies
    )
    users = UserService(UserStore(database), consents, withdrawals, TenantAudits(system), audit_log)
    billing_store = BillingStore(system)
    billing = BillingService(billing_store, ManualPayments(billing_store))
    erasure_archive = ErasureArchive(
        erasures, blobs, audit_keys.signer, audit_keys.known, copies=copies
    )
    audit_work = AuditWorkService(Checkpointer(checkpoint_store, archive, audit_keys))
    privacy = PrivacyService(
        erasures,
        ExportStore(database, timedelta(days=settings.export_days)),
        hashing.match,
        audit_keys.signer,
        blobs,
        url_lifetime=timedelta(seconds=settings.upload_url_seconds),
    )

    def register(server: grpc.aio.Server) -> None:
        auth_pb2_grpc.add_AuthServiceServicer_to_server(auth, server)
        auth_pb2_grpc.add_TenantServiceServicer_to_server(tenants, server)
        users_pb2_grpc.add_UserServiceServicer_to_server(users, server)
        users_pb2_grpc.add_AuditWorkServiceServicer_to_server(audit_work, server)
        privacy_pb2_grpc.add_PrivacyServiceServicer_to_server(privacy, server)
        billing_pb2_grpc.add_BillingServiceServicer_to_server(billing, server)

    forgetful = [each.forget for each in (ended, attempts, mails, sign_ups, api_keys, members)]
    housekeeping = Housekeeping(forgetful)
    delivery = [Postman(mails, mailer).run] if mailer else []
    return Application(
        register,
        keyring,
        ended,
        ErasedUsers(system),
        open_toll(settings, stack, system),
        loops=[
            audit_log.run,
            erasure_archive.run,
            withdrawals.run,
            housekeeping.run,
            costs.run,
            *delivery,
        ],
        readings=_readings(system),
        turnstile=open_turnstile(settings, stack),
    )


def _issuer(settings: Settings, keyring: Keyring) -> Issuer:
    mint = Mint(
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        lifetime=timedelta(seconds=settings.access_token_seconds),
    )
    return Issuer(keyring, mint, timedelta(seconds=settings.refresh_token_seconds), utc_now)


def _readings(system: SystemDatabase) -> list[Reading]:
    audit, billing = AuditReadings(system), BillingReadings(system)
    return [
        AuthReadings(system).mails,
        audit.lag,
        audit.unsigned,
        billing.usage,
        billing.plans,
    ]


def _breached(settings: Settings) -> Sequence[Breached]:
    file = settings.breached_passwords_file
    return (Commonplace(), HashFile(file)) if file else (Commonplace(),)


def _mailer(settings: Settings) -> Mailer | None:
    if settings.smtp_host:
        return Smtp(
            settings.smtp_host,
            settings.smtp_port,
            settings.mail_sender,
            settings.smtp_user,
            settings.smtp_password.get_secret_value(),
        )
    if settings.mail_directory:
        return Outbox(settings.mail_directory, settings.mail_sender)
    log.warning(
        "mails wait: neither smtp_host nor mail_directory is set",
        sign_ups_refused=settings.sign_up_confirms_email,
    )
    return None
