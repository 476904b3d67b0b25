"""CURVE keys of a job's coordinator and its clients, derived from the job's key: whoever lacks it can do nothing.

job key ──HMAC "coordinator server"──► server's secret ──► server's public key   (clients know both)
        ──HMAC "coordinator client"──► clients' secret ──► clients' public key   (the server admits no other)
"""

from __future__ import annotations

import hmac
from typing import NamedTuple

import zmq
from zmq.utils import z85


class CurveKeys(NamedTuple):
    """Both as 40 printable characters (Z85)."""

    public: bytes
    secret: bytes


def curve_keys(key: bytes, role: str) -> CurveKeys:
    """The keys of the "server" or of a "client" of the job with this key."""
    secret = z85.encode(hmac.digest(key, f"coordinator {role}".encode(), "sha256"))
    return CurveKeys(zmq.curve_public(secret), secret)
