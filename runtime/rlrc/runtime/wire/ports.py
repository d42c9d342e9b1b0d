"""What all network ports share: access, limits on connections, and TLS."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rlrc.errors import UserError
from rlrc.runtime.wire import http_head

CLIENTS = 32  # at a time, per port
CONNECTIONS = 128  # at a time, per port, including those without a request
PINGS, PING_S = 64, 1.0  # burst of pings, and seconds per further ping
PATIENCE_S = 10.0  # a client without an answer for so long may be replaced
CLOSED_STATES = (6, 7, 8, 9, 11)  # TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK and CLOSING of linux/tcp_states.h
TOKEN = "RLRC_TOKEN"  # an environment variable is hidden from other users, unlike an argument

LARGEST = 16 * 2**20  # bytes of a message: four images of 1280 x 960 fit

VISIBLE = re.compile("[!-~]+")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """``token``: required from clients; ``tls``: encrypts connections. None: not required."""

    token: str | None = None
    tls: ssl.SSLContext | None = None

    def allows(self, authorization: str | None) -> bool:
        """``authorization``: the header's value."""
        return self.token is None or http_head.has_token(authorization, self.token)


def is_connected(transport: asyncio.BaseTransport | None) -> bool:
    """Whether the peer is connected, according to the kernel: nothing is read while a request is being answered."""
    if transport is None or transport.is_closing():
        return False
    peer = transport.get_extra_info("socket")
    state: int = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state not in CLOSED_STATES


def release_frames(error: BaseException) -> None:
    """Release what the traceback's frames refer to, such as a message of 16 MiB. Exceptions of asyncio and aiohttp are
    parts of reference cycles, which are only freed by the garbage collector, after hundreds of them.
    """
    chained: BaseException | None = error
    while chained is not None:
        chained.__traceback__ = None
        chained = chained.__cause__ or chained.__context__


class RateLimit:
    """A burst of ``number``, and one more every ``seconds``."""

    def __init__(self, number: int, seconds: float) -> None:
        self._number, self._seconds = number, seconds
        self._left, self._since = float(number), time.monotonic()

    def spend(self) -> bool:
        """Returns whether one was left."""
        now = time.monotonic()
        self._left = min(self._number, self._left + (now - self._since) / self._seconds) - 1
        self._since = now
        return self._left >= 0


class Places:
    """Places for ``number`` connections. If all are taken, the oldest one that has had no answer for ``patience_s`` is
    closed: idle connections do not keep others out, and working ones are never replaced.
    """

    def __init__(self, number: int, patience_s: float) -> None:
        self._number, self._patience_s = number, patience_s
        self._silent: dict[object, tuple[float, Callable[[], None]]] = {}  # oldest first
        self._answered: set[object] = set()

    def take(self, connection: object, leave: Callable[[], None]) -> bool:
        """Returns whether there was a place. ``leave`` closes the connection."""
        if len(self._silent) + len(self._answered) >= self._number and not self._make_room():
            return False
        self._silent[connection] = (time.monotonic(), leave)
        return True

    def mark_answered(self, connection: object) -> None:
        if self._silent.pop(connection, None) is not None:
            self._answered.add(connection)

    def free(self, connection: object) -> None:
        """Free the connection's place, if it has one."""
        self._silent.pop(connection, None)
        self._answered.discard(connection)

    def _make_room(self) -> bool:
        first = next(iter(self._silent), None)
        if first is None or time.monotonic() - self._silent[first][0] < self._patience_s:
            return False
        _, leave = self._silent.pop(first)
        leave()
        return True


def token(given: str | None) -> str | None:
    """The token of the option or the environment; None: there is none. Raises UserError if it is invalid."""
    name, found = (TOKEN, os.environ.get(TOKEN)) if given is None else ("--token", given)
    return None if found is None else check_token(found, name)


def check_token(token: str, name: str) -> str:
    """Raises UserError for an invalid token, without quoting it; ``name``: where it was given."""
    if not VISIBLE.fullmatch(token):
        found = "an empty one" if not token else "a line end" if token != token.rstrip("\r\n") else "other characters"
        raise UserError(
            f"expected a token of ASCII characters without blanks in {name}, found {found}; give another"
            + (", or unset it" if name == TOKEN else "")
        )
    return token


def access(host: str, token: str | None, certificate: Path | None, key: Path | None, insecure: bool) -> Access:
    """Raises UserError for invalid files, and for an address that other machines reach without protection."""
    if token is not None:
        check_token(token, "--token")
    if (certificate is None) != (key is None):
        raise UserError("expected both --certificate and --key, found one; give the other")
    encrypted = None if certificate is None or key is None else tls(certificate, key)
    if not (is_loopback(host) or (token is not None and encrypted is not None) or insecure):
        raise UserError(
            f"expected --token, --certificate and --key for {host}, which other machines reach, found not all of them; "
            "give them, or --insecure"
        )
    return Access(token, encrypted)


def tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server's TLS context, which logs failed handshakes. Raises UserError for invalid files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = _Handshake

    def password() -> NoReturn:  # otherwise OpenSSL would prompt on the terminal
        raise UserError(
            f"expected a private key without a password, found an encrypted one in {key}; decrypt it into a "
            f"file that only you can read: openssl pkey -in {key} -out FILE"
        )

    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(f"expected a PEM file at {path}, found: {error.strerror}; choose another") from None
    try:
        context.load_cert_chain(certificate, key, password)
    except OSError as error:  # including SSLError
        why = (getattr(error, "reason", None) or "no PEM file").replace("_", " ").lower()
        raise UserError(
            f"expected a certificate and its key in PEM files, found {certificate} and {key}: {why}; choose others"
        ) from None
    return context


class _Handshake(ssl.SSLObject):
    """Logs failed handshakes; asyncio closes the connection silently."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            found = (error.reason or "another message").replace("_", " ").lower()
            plain = error.reason in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG")
            advice = "use wss:// or https:// in the client" if plain else "check the certificates the client trusts"
            log.info("expected a TLS handshake, found: %s; %s", found, advice, extra={"fields": {"outcome": "tls"}})
            raise


def url(scheme: str, host: str, port: int) -> str:
    """A URL, with brackets around an IPv6 address."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_plain(host: str, protocols: Collection[str], insecure: bool) -> None:
    """Raises UserError for protocols without TLS at an address that other machines reach."""
    if is_loopback(host):
        return
    if "lerobot" in protocols:
        raise UserError(
            f"expected --host 127.0.0.1 with lerobot, whose clients send no token and run code of the server, found "
            f"{host}; serve it on the robot itself"
        )
    if "gr00t" in protocols and not insecure:
        raise UserError(
            f"expected --insecure with gr00t on {host}, since GR00T's protocol has no TLS, found none; use a tunnel to "
            "127.0.0.1, or give it"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
