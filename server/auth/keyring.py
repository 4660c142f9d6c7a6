"""The signing keys in this process's hands."""

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, NoReturn

import structlog
from joserfc.jwk import ECKey

from server.auth.key_store import KeyStore
from server.auth.signing_keys import PUBLISHED_BEFORE, SigningKey, State, states
from server.clock import Clock, utc_now
from server.errors import NotFound, StoreUnavailable
from server.kms import Kms
from server.tokens import ALGORITHM, LEEWAY_SECONDS, PublicKeys

log = structlog.get_logger()

_RELOAD_SECONDS: Final = 5.0
_SKEW_SECONDS: Final = 30


class Keyring:
    """Signs with the key whose turn it is, publishes all that count, and hands over in time.

    Every process of auth has one and reloads it from the store every few seconds. It is also the
    `server.tokens.KeySource` of that process.
    """

    def __init__(
        self,
        store: KeyStore,
        kms: Kms,
        *,
        access_token_seconds: int,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._kms = kms
        self._clock = clock
        self._tokens_outlive = timedelta(
            seconds=access_token_seconds + LEEWAY_SECONDS + _SKEW_SECONDS
        )
        self._stored: Sequence[SigningKey] = ()
        self._public: PublicKeys = {}
        self._private: dict[str, ECKey] = {}

    @property
    def keys(self) -> PublicKeys:
        """The published keys by kid: those that may have signed a living token, and the next."""
        return self._public

    async def signer(self) -> ECKey:
        """Return the private key that signs now.

        Raises:
            StoreUnavailable: No key could be loaded yet.
        """
        if not self._stored:
            await self.refresh()
        for kid, state in self._states(self._clock()).items():
            if state is State.SIGNING:
                return self._private[kid]
        raise StoreUnavailable("the store of the signing keys")

    async def ensure_signing_key(self) -> None:
        """Make the first key unless there is one, and load what there is.

        Raises:
            StoreUnavailable: PostgreSQL or the key manager does not answer.
            UnwrapFailed: No master key that is left wrapped the signing keys.
        """
        if not await self._store.list_keys():
            now = self._clock()
            await self._store.add_first(await self._generate(published_at=now, signs_from=now))
        await self._load()

    async def rotate(self) -> SigningKey:
        """Publish a new key, which takes over when everyone has heard of it.

        Returns:
            The key that takes over next: the new one, or the one of a rotation under way.
        """
        await self.ensure_signing_key()
        now = self._clock()
        key = await self._generate(published_at=now, signs_from=now + PUBLISHED_BEFORE)
        await self._store.add_next(key)
        await self._load()
        return max(self._stored, key=lambda stored: stored.signs_from)

    async def withdraw(self, kid: str) -> SigningKey:
        """Withdraw a key that is in the wrong hands, without waiting for anything.

        Should it be the one that signs, another takes over at once, before everyone has heard of
        it: until they have, tokens of that one are refused, and clients refresh in vain.

        Returns:
            The key that signs from now on.

        Raises:
            NotFound: There is no such key, or it was withdrawn before.
        """
        await self.ensure_signing_key()
        now = self._clock()
        if not await self._store.replace(
            kid, await self._generate(published_at=now, signs_from=now)
        ):
            raise NotFound("signing key")
        await self._load()
        signs = {each for each, state in self._states(now).items() if state is State.SIGNING}
        return next(key for key in self._stored if key.kid in signs)

    async def refresh(self) -> None:
        """Load the keys and withdraw those that no living token needs.

        With PostgreSQL away the keys at hand stay in use.
        """
        try:
            await self.ensure_signing_key()
            await self._withdraw_outlived()
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("signing keys not loaded", error=repr(error))

    async def run(self) -> NoReturn:
        """Keep the keys fresh."""
        while True:
            await self.refresh()
            await asyncio.sleep(_RELOAD_SECONDS)

    def _states(self, now: datetime) -> dict[str, State]:
        return states(self._stored, now, self._tokens_outlive)

    async def _load(self) -> None:
        stored = await self._store.list_keys()
        private = {key.kid: self._private.get(key.kid) or await self._unwrap(key) for key in stored}
        public = {key.kid: ECKey.import_key(dict(key.public_jwk)) for key in stored}
        # All at once: other calls sign and verify while this one waits.
        self._stored, self._private = stored, private
        if public != self._public:
            self._public = public
            log.info("signing keys changed", kids=sorted(public))

    async def _withdraw_outlived(self) -> None:
        now = self._clock()
        outlived = [kid for kid, state in self._states(now).items() if state is State.WITHDRAWN]
        if outlived:
            await self._store.withdraw(outlived, now)
            await self._load()

    async def _generate(self, *, published_at: datetime, signs_from: datetime) -> SigningKey:
        key = ECKey.generate_key("P-256", {"use": "sig", "alg": ALGORITHM}, auto_kid=True)
        kid = key.thumbprint()
        secret = json.dumps(key.as_dict(private=True)).encode()
        return SigningKey(
            kid=kid,
            public_jwk={name: str(value) for name, value in key.as_dict(private=False).items()},
            wrapped_private_key=await self._kms.wrap(secret, context=_context(kid)),
            published_at=published_at,
            signs_from=signs_from,
        )

    async def _unwrap(self, key: SigningKey) -> ECKey:
        secret = await self._kms.unwrap(key.wrapped_private_key, context=_context(key.kid))
        return ECKey.import_key(json.loads(secret))


def _context(kid: str) -> bytes:
    return f"signing key {kid}".encode()
