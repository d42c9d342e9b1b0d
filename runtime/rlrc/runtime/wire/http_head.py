"""A strict parser for the head of an HTTP/1.1 request, used before any library.

    head = parse(b"POST /stop HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")       # raises Refusal(400, 411, 415, 417, 431)
    head.method, head.path, head.length, head.get("authorization")

Features of HTTP that rlrc's clients do not need are refused: folded fields, repeated fields of ``_ONCE``, chunked and
compressed bodies, upgrades, control characters. A compressed body would have to be decompressed before its sender is
authorised (RFC 9112; RFC 9110, 15.5.16).
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

LARGEST = 2**14  # bytes; browsers send the cookies of all servers on the host
MAX_FIELDS = 64
END = b"\r\n\r\n"

_BEGINNING = re.compile(rb"[A-Z]{1,16}(?: |\Z)")
_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile(rb"[0-9]{1,12}")
_ONCE = (b"host", b"content-length", b"content-encoding", b"authorization", b"origin")
_HOST = re.compile(r"[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\]")


class Refusal(Exception):
    """The response to a refused request: a status, and one line that does not quote the request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Head(NamedTuple):
    """``path``: without the query; ``length``: of the body, bytes; ``persistent``: whether a request may follow.

    ``fields``: values by lower-case names.
    """

    method: str
    path: str
    fields: dict[bytes, bytes]
    length: int
    persistent: bool

    def get(self, name: str) -> str | None:
        """A field's value; decoded as ISO-8859-1, which accepts all bytes."""
        value = self.fields.get(name.encode())
        return None if value is None else value.decode("latin-1")


def begins(data: bytes) -> bool:
    """Whether these bytes, at least one, may begin a head. Those of TLS and other protocols do not."""
    return _BEGINNING.match(data) is not None


def no_http() -> Refusal:
    return Refusal(400, "expected an HTTP/1.1 request line, found something else")


def parse(data: bytes) -> Head:
    """``data``: the request including the empty line after its head. Raises Refusal."""
    first, *lines = data[: -len(END)].split(b"\r\n")
    matched = _LINE.fullmatch(first)
    if matched is None:
        raise no_http()
    if len(lines) > MAX_FIELDS:
        raise Refusal(431, f"expected up to {MAX_FIELDS} header fields, found {len(lines)}")
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        value = value.strip(b" \t")
        if not colon or not _NAME.fullmatch(name) or _CONTROL.search(value):
            raise Refusal(400, "expected header fields as name: value, found another line")
        name = name.lower()
        if name in fields and name in _ONCE:
            raise Refusal(400, f"expected {name.decode()} once, found it twice")
        fields[name] = value
    return Head(
        method=matched[1].decode(),
        path=matched[2].partition(b"?")[0].decode(),
        fields=fields,
        length=_length(fields),
        persistent=matched[3] == b"1" and fields.get(b"connection", b"").lower() != b"close",
    )


def has_token(authorization: str | None, token: str) -> bool:
    """Whether the field is "Bearer TOKEN", or "Api-Key TOKEN" as openpi's clients send it."""
    scheme, _, given = (authorization or "").partition(" ")
    right = hmac.compare_digest(given.encode(errors="surrogatepass"), token.encode())
    return right and scheme.lower() in ("api-key", "bearer")


def host(field: str) -> str | None:
    """The host name or address in the field Host, without the port; None if it is malformed."""
    name = re.sub(r":[0-9]*\Z", "", field)
    return name if _HOST.fullmatch(name) else None


def _length(fields: dict[bytes, bytes]) -> int:
    if b"upgrade" in fields:
        raise Refusal(400, "expected plain HTTP/1.1, found an upgrade to another protocol")
    if b"transfer-encoding" in fields:
        raise Refusal(411, "expected a body with Content-Length, found Transfer-Encoding; send it in one piece")
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "expected a body without Content-Encoding, found an encoded one; send it as it is")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refusal(417, "expected 100-continue in Expect, found another; leave the field out")
    length = fields.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise Refusal(400, "expected Content-Length in digits, found another")
    return int(length)


def response(
    status: int,
    body: str = "",
    kind: str = "text/plain; charset=utf-8",
    close: bool = True,
    fields: Mapping[str, str] | None = None,
) -> bytes:
    """A complete response. ``fields``: further header fields."""
    header = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} if body else {}
    header |= {"Content-Length": str(len(body.encode()))} if status != 204 else {}
    header |= {"Connection": "close"} if close else {}
    header |= fields or {}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in header.items())]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def origin(scheme: str, host: str, port: int) -> str:
    """The origin, as browsers write it."""
    return f"{scheme}://{host}" + ("" if port == {"http": 80, "https": 443}[scheme] else f":{port}")
