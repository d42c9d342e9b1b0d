"""The REST protocol of OpenVLA and OpenVLA-OFT: POST /act with JSON, whose arrays are json_numpy's maps.

    {"__numpy__": base64 of C-order bytes, "dtype": "|u1", "shape": [224, 224, 3]}

The answer is one action (dim,), or for OFT's clients (a mapping with ``chunks``) the list of the chunk's actions, in
the same encoding. A body whose only key is "encoded" contains the request as a JSON string; its answer is a string too.
An error is the JSON string "error" with status 200; the reason is in the header X-Error and in the log.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Session
from rlrc.runtime.servers.status import status
from rlrc.runtime.wire.arrays import DTYPE, MAX_CONTAINERS, MAX_DIMENSIONS, MAX_ENTRIES
from rlrc.runtime.wire.gate import HttpConnection, count_answers, listen
from rlrc.runtime.wire.http_head import Head, Refusal
from rlrc.runtime.wire.logs import fields
from rlrc.runtime.wire.ports import CLIENTS, CONNECTIONS, LARGEST, Access, Places, is_connected, release_frames

PROTOCOL = "openvla"
BODY_S = 10.0  # limit for a client to send its request
IDLE_S = 75.0  # limit between requests, and until the first one

log = logging.getLogger(__name__)


class OpenvlaServer:
    """Listens on one port. Call ``start``, and ``stop`` after the session has been drained.

    All clients share one episode, since the protocol has none. Raises UserError for a policy of chunks if the mapping
    has clients that take one action.
    """

    def __init__(self, session: Session, observations: Observations, access: Access) -> None:
        horizon = session.spec.action.horizon
        if horizon > 1 and not observations.mapping.chunks:
            raise UserError(
                f"expected a policy of single actions for OpenVLA's clients, found chunks of {horizon}; serve OFT's "
                "clients with --mapping openvla openvla-oft, or set chunks = true in your own mapping"
            )
        self._session, self._observations, self._access = session, observations, access
        self._client, self._busy = session.client(), 0
        self._places = Places(CONNECTIONS, 0.0)
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises UserError if it is taken."""
        app = web.Application(client_max_size=LARGEST, middlewares=[count_answers])
        app.router.add_post("/act", self._act)
        app.router.add_get("/{path:.*}", self._status)
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
        try:
            self._listening = await listen(
                self._runner, self._check, self._places, host, port, self._access.tls, IDLE_S, IDLE_S
            )
        except OSError as error:
            raise UserError(f"expected a free port on {host}, found {port}: {error.strerror}; choose another") from None
        return int(self._listening.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._listening is not None:
            self._listening.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def _check(self, head: Head) -> None:
        """Raises Refusal."""
        if head.path == "/act":
            if head.get("origin") is not None:  # sent by browsers
                raise Refusal(403, "expected no browser")
            if not self._access.allows(head.get("authorization")):
                raise Refusal(401, "expected the header Authorization: Bearer TOKEN")
        if head.length > (LARGEST if head.path == "/act" else 0):
            raise Refusal(413, f"expected a body of up to {LARGEST} bytes at /act, found {head.length} bytes")

    async def _status(self, request: web.Request) -> web.Response:
        found = status(request.path, self._session, self._access, request.headers.get("Authorization"))
        if found is None:
            return web.Response(status=404, text="expected POST /act\n")
        code, body, kind = found
        return web.Response(status=code, body=body.encode(), headers={"Content-Type": kind})

    async def _act(self, request: web.Request) -> web.Response:
        if self._busy >= CLIENTS:
            return web.Response(status=503, text=f"the server is full ({CLIENTS} requests); retry later\n")
        self._busy += 1
        try:
            body = await asyncio.wait_for(request.read(), BODY_S)
            connected = partial(is_connected, request.transport)
            with self._session.track(PROTOCOL):
                answer = web.Response(text=await self._answer(body, connected), content_type="application/json")
            if isinstance(request.protocol, HttpConnection):
                request.protocol.keep_place()
            return answer
        except RequestRefused as error:
            log.info("openvla client %s: %s", request.remote, error, extra=_log_fields(request, error.kind))
            release_frames(error)
            return _error(str(error))
        except asyncio.TimeoutError as error:
            release_frames(error)
            return web.Response(status=408, text=f"expected the request within {BODY_S:g} s\n")
        except web.HTTPException as error:
            release_frames(error)
            return web.Response(status=error.status, text=error.text)  # such as 413
        except ConnectionError as error:
            release_frames(error)
            log.info("openvla client %s: gone", request.remote, extra=_log_fields(request, "gone"))
            raise
        except Exception:
            log.exception("openvla client %s", request.remote, extra=_log_fields(request, "fault"))
            return _error("internal server error; see the server's log")
        finally:
            self._busy -= 1

    async def _answer(self, body: bytes, connected: Callable[[], bool] = lambda: True) -> str:
        payload, twice = _parse(body), False
        if isinstance(payload, dict) and payload.keys() == {"encoded"}:
            payload, twice = _parse(str(payload["encoded"]).encode(errors="surrogatepass")), True
        # unnorm_key is ignored: an artifact has the statistics of one data set.
        chunk = await self._client.infer(self._observations.convert(payload), connected)
        rows = [_encode(action) for action in chunk.actions]
        answer = json.dumps(rows if self._observations.mapping.chunks else rows[0])
        return json.dumps(answer) if twice else answer


def _parse(body: bytes) -> Any:
    """Raises UserError for invalid JSON, invalid arrays, and more values than any observation has."""
    if body.count(b"{") + body.count(b"[") > MAX_CONTAINERS or body.count(b",") > MAX_ENTRIES:
        raise UserError(
            f"expected up to {MAX_CONTAINERS} maps and lists, and arrays as json_numpy's, found more; use json_numpy"
        )
    try:
        return json.loads(body, object_hook=_decode_map)
    except (ValueError, RecursionError) as error:
        why = str(error)[:100] or type(error).__name__
        if isinstance(error, UserError):
            raise
        raise UserError(f"expected JSON, found: {why}; use json.dumps") from None


def _decode_map(values: dict[str, Any]) -> Any:
    if "__numpy__" not in values:
        return values
    data, dtype, shape = values["__numpy__"], values.get("dtype"), values.get("shape")
    if not isinstance(data, str) or not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise UserError(
            f"expected an array of numbers in base64, found dtype {str(dtype)[:40]!r}; send floats or integers"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise UserError(
            f"expected an array's shape as up to {MAX_DIMENSIONS} sizes, found {str(shape)[:40]!a}; send such"
        )
    raw = base64.b64decode(data, validate=True)
    if (size := math.prod(shape) * np.dtype(dtype).itemsize) != len(raw):
        raise UserError(f"expected {size} bytes for {dtype} {tuple(shape)}, found {len(raw)}; send the whole array")
    return np.frombuffer(raw, dtype).reshape(shape)


def _encode(action: NDArray[np.float32]) -> dict[str, Any]:
    data = base64.b64encode(action.tobytes()).decode()
    return {"__numpy__": data, "dtype": action.dtype.str, "shape": list(action.shape)}


def _error(why: str) -> web.Response:
    header = "".join(character if character.isprintable() and character.isascii() else "?" for character in why)
    return web.Response(text='"error"', content_type="application/json", headers={"X-Error": header[:500]})


def _log_fields(request: web.Request, outcome: str) -> dict[str, Any]:
    return fields(protocol=PROTOCOL, client=request.remote, outcome=outcome)
