"""Who may connect, and from where: bearer tokens, TLS, and the refusal to serve the world without both."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ugsd_fast.errors import UGSDError

ANONYMOUS = "anonymous"
_SHORTEST_TOKEN = 16


class UnsafeServer(UGSDError, ValueError):
    """A server that would be open to the world without TLS or without a token."""


class Tokens:
    """Bearer tokens and the names that quotas, sessions and logs know their bearers by.

    Parameters
    ----------
    tokens : mapping of str to str
        Name -> token. Only digests are kept.

    Raises
    ------
    ValueError
        If a token is shorter than 16 characters.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None):
        for name, token in (tokens or {}).items():
            if len(token) < _SHORTEST_TOKEN:
                raise ValueError(f"token of {name}: {len(token)} characters, expected at least {_SHORTEST_TOKEN}")
        self._digests = {name: _digest(token) for name, token in (tokens or {}).items()}

    def __len__(self) -> int:
        return len(self._digests)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Tokens:
        """Read a file with a line ``name token`` for each bearer; empty lines and those begun by # are skipped.

        Raises
        ------
        ValueError
            If the file has no such line, or another.
        """
        tokens = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            fields = line.split()
            if len(fields) != 2:
                raise ValueError(f"{path}: line {number} has {len(fields)} words, expected a name and a token")
            tokens[fields[0]] = fields[1]
        if not tokens:
            raise ValueError(f"{path}: has no token, expected lines of a name and a token")
        return cls(tokens)

    def bearer(self, authorization: str | None) -> str | None:
        """Name of the bearer of an ``Authorization`` header, None where it is not let in.

        Every token is compared, in time that does not depend on where a wrong one differs.
        """
        if not self._digests:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        given = _digest(token.strip())
        found = None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found if scheme.lower() == "bearer" else None


@dataclass(frozen=True)
class TLS:
    """Certificate and key of the server; `client_ca` makes clients present a certificate that it has signed (mTLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def settings(self) -> dict[str, object]:
        """Arguments of ``uvicorn.Config``."""
        chosen: dict[str, object] = {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)}
        if self.client_ca is not None:
            chosen |= {"ssl_ca_certs": str(self.client_ca), "ssl_cert_reqs": int(ssl.CERT_REQUIRED)}
        return chosen


def check_binding(host: str, *, tls: TLS | None, tokens: Tokens) -> None:
    """Refuse to listen on an address that others can reach without both TLS and a token.

    Raises
    ------
    UnsafeServer
        Naming what is missing.
    """
    missing = [
        name for name, there in (("TLS (--cert, --key)", tls), ("a token (--token-file)", len(tokens))) if not there
    ]
    if missing and not is_loopback(host):
        raise UnsafeServer(f"serve: {host} can be reached from other machines, expected {' and '.join(missing)}")


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine only; any name but localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
