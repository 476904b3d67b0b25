"""torch's key-value store for those who hold the job's key: every value is sealed, and what is not sealed is refused.

    set("torch/0/rank0", v) ──► TCPStore: HMAC(key, "torch/0/rank0" v) v ──► get: checked, then v

Whoever can reach the store's port can write into it, as torch has no keys. A seal binds a value to its name, so that
nobody else can give it, or give one name's value to another. What torch itself adds up there (`add`: how many have
come) stays unsealed, and whoever wants to can still delete names, and so keep a job from starting.

`PrefixStore`, Gloo and `new_group` work on top; NCCL only needs `set`, `get`, `wait` and `check` of it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from pipeline.errors import Forged, UserError

DIGEST_BYTES = 32
LEAST_KEY_BYTES = 16
KEY_VARIABLE = "HETURUN_KEY"


def job_key(environment: Mapping[str, str]) -> bytes | None:
    """The job's key, from HETURUN_KEY, which heturun sets and others may; None where nobody has.

    Raises:
        UserError: it is no key.
    """
    text = environment.get(KEY_VARIABLE, "")
    if not text:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) < LEAST_KEY_BYTES:
        raise UserError(
            f"{KEY_VARIABLE} is no key of at least {2 * LEAST_KEY_BYTES} hexadecimal digits; "
            f"give every process the same, as from `openssl rand -hex 32`"
        )
    return key


def sealed(store: Store, key: bytes | None) -> Store:
    """The store for those who hold the job's key; the open one where there is none."""
    if key is None:
        return store
    return SealedStore(store, hmac.digest(key, b"store", "sha256"))  # who may speak to a replica may not write here


def seal(key: bytes, name: str, value: bytes) -> bytes:
    """The value with the proof that somebody who holds the key wrote it under this name."""
    return _digest(key, name, value) + value


def unseal(key: bytes, name: str, sealed: bytes) -> bytes:
    """The inverse of `seal`.

    Raises:
        Forged: nobody who holds the key wrote this under this name.
    """
    digest, value = sealed[:DIGEST_BYTES], sealed[DIGEST_BYTES:]
    if not hmac.compare_digest(digest, _digest(key, name, value)):
        raise Forged(f"{len(sealed)} bytes in the store under {name!r} are not sealed with this job's key: refused")
    return value


def _digest(key: bytes, name: str, value: bytes) -> bytes:
    written = name.encode()
    return hmac.digest(key, len(written).to_bytes(8, "big") + written + value, "sha256")


class SealedStore(Store):
    """A store whose values are sealed, around one that anybody can write into; to be kept while anything uses it."""

    timeout: timedelta  # of `get`, and of `wait` where none is given

    def __init__(self, inner: Any, key: bytes) -> None:  # Any: torch's declarations know neither bytes nor timeouts
        super().__init__()
        self._inner, self._key = inner, key
        self._clones: list[SealedStore] = []  # C++ holds no Python object
        self.set_timeout(inner.timeout)

    def set(self, name: str, value: str | bytes) -> None:
        self._inner.set(name, self._seal(name, value))

    def get(self, name: str) -> bytes:
        return unseal(self._key, name, self._timed().get(name))

    def compare_set(self, name: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Sets it to `desired` if it is `expected`, or, where that is empty, not there; returns what it is then."""
        before = self._seal(name, expected) if expected else b""
        return unseal(self._key, name, self._inner.compare_set(name, before, self._seal(name, desired)))

    def add(self, name: str, amount: int) -> int:
        return int(self._inner.add(name, amount))

    def check(self, names: Sequence[str]) -> bool:
        return bool(self._inner.check(list(names)))

    def wait(self, names: Sequence[str], timeout: timedelta | None = None) -> None:
        self._inner.wait(list(names), self.timeout if timeout is None else timeout)

    def delete_key(self, name: str) -> bool:
        return bool(self._inner.delete_key(name))

    def num_keys(self) -> int:
        return int(self._inner.num_keys())

    deleteKey, getNumKeys = delete_key, num_keys  # what torch's C++ calls them

    def multi_get(self, names: Sequence[str]) -> list[bytes]:
        return [self.get(name) for name in names]

    def multi_set(self, names: Sequence[str], values: Sequence[str | bytes]) -> None:
        for name, value in zip(names, values, strict=True):
            self.set(name, value)

    def has_extended_api(self) -> bool:
        """No: what others append to cannot be sealed."""
        return False

    def clone(self) -> SealedStore:
        again = SealedStore(self._timed().clone(), self._key)
        self._clones.append(again)
        return again

    def _timed(self) -> Any:
        """The store inside, with this one's timeout: C++ sets it here, unseen."""
        if self._inner.timeout != self.timeout:
            self._inner.set_timeout(self.timeout)
        return self._inner

    def _seal(self, name: str, value: Any) -> bytes:
        return seal(self._key, name, value.encode() if isinstance(value, str) else bytes(value))
