"""Messages that nobody on the way can read or change, with what the standard library has.

    both ends hold the job's key and, from the handshake, the nonces s and c
    direction ──► K = HMAC(key, "cipher" direction s c)      M = HMAC(key, "seal" direction s c)
    n-th text ──► text XOR SHAKE-256(K n)   ──►  HMAC(M, n | that) in front of it

Every connection has new nonces and every message a new number, so no key stream is used twice, and a message that is
left out, repeated, moved or sent back does not open.
"""

from __future__ import annotations

import hashlib
import hmac

SEAL_BYTES = 32


class Sealer:
    """One direction of one connection; both ends have one like it and count the same messages.

    Args:
        key: the job's.
        direction: "c" for what the client sends, "s" for what the server sends.
        nonces: of this connection, from both ends.
    """

    def __init__(self, key: bytes, direction: bytes, nonces: bytes) -> None:
        self._cipher_key = hmac.digest(key, b"cipher" + direction + nonces, "sha256")
        self._seal_key = hmac.digest(key, b"seal" + direction + nonces, "sha256")
        self._count = 0

    def close(self, text: bytes) -> bytes:
        """The next message, sealed: SEAL_BYTES longer."""
        number = self._next()
        hidden = self._cipher(number, text)
        return self._seal(number, hidden) + hidden

    def open(self, message: bytes) -> bytes:
        """The text of the next message.

        Raises:
            ValueError: it is not the next message of the other end.
        """
        number, seal, hidden = self._next(), message[:SEAL_BYTES], message[SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(number, hidden)):
            raise ValueError("a message was changed on its way")
        return self._cipher(number, hidden)

    def _next(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(8, "big")

    def _seal(self, number: bytes, hidden: bytes) -> bytes:
        return hmac.digest(self._seal_key, number + hidden, "sha256")

    def _cipher(self, number: bytes, text: bytes) -> bytes:
        stream = hashlib.shake_256(self._cipher_key + number).digest(len(text))
        return (int.from_bytes(text, "little") ^ int.from_bytes(stream, "little")).to_bytes(len(text), "little")
