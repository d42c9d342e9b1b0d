"""A client of openpi's protocol: a policy on `rlrc serve` or any openpi server.

    with RemotePolicy("ws://10.0.0.2:8000", token="...") as policy:
        chunk = policy.infer(observation)["actions"]       # as rlrc.runtime.inference.policy takes it
        policy.latency()                                   # {"calls", "reconnects", "p50_ms", "p99_ms", "max_ms"}

After a timeout the connection is closed, so that a late answer is never taken for the answer to a newer observation.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, WebSocketException

from rlrc.errors import UserError
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import InferenceTiming, Result
from rlrc.runtime.wire import arrays
from rlrc.runtime.wire.ports import LARGEST, check_token
from rlrc.runtime.wire.websocket import WebSocket

KEPT_LATENCIES = 10_000  # the newest ones, for the statistics


class RemotePolicy:
    """A Policy. ``timeout_s``: limit of ``infer``, including a new connection.

    ``keys``: from rlrc's names to the server's, for servers other than `rlrc serve` with mapping "own". ``authority``:
    a PEM file with the certificate to trust, for wss. Raises UserError if no server answers at ``url`` within
    ``connect_s``; a server that is loading its policy answers late.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 2.0,
        connect_s: float = 60.0,
        keys: Mapping[str, str] | None = None,
        authority: Path | None = None,
    ) -> None:
        if not url.startswith(("ws://", "wss://")) or not timeout_s > 0:
            raise UserError(
                f"expected a ws:// or wss:// URL and a timeout above 0 s, found {url} and {timeout_s}; correct them"
            )
        self.url, self.timeout_s, self._keys = url, timeout_s, dict(keys or {})
        self._headers = {} if token is None else {"Authorization": f"Api-Key {check_token(token, 'token')}"}
        self._tls = _load_authority(authority) if url.startswith("wss://") else None
        self._connection: WebSocket | None = None
        self._seconds: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self._packing_s = 0.0
        self.metadata: dict[str, Any] = {}
        self.reconnects = 0
        try:
            self._connect(connect_s)
        except NoAction as error:
            raise UserError(f"{error}; start the server, or give another URL or token") from None

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def infer(self, observation: Mapping[str, Any]) -> Result:
        """Raises NoAction if the server refuses the observation or does not answer in time.

        After a lost connection it reconnects and sends the observation once more. In the timing, ``decoder_ms`` is the
        server's inference and ``postprocess_ms`` the transport.
        """
        begun = perf_counter()
        deadline = monotonic() + self.timeout_s
        message = {self._keys.get(name, name): value for name, value in observation.items()}
        try:
            answer = self._ask(message, deadline)
            actions = _check_actions(answer)
        except BaseException:  # including Ctrl-C: a late answer must not be taken for the next one
            self.close()
            raise
        total = perf_counter() - begun
        self._seconds.append(total)
        inferred_ms = _find_infer_ms(answer)
        timing = InferenceTiming(
            preprocess_ms=self._packing_s * 1e3,
            vision_ms=0.0,
            decoder_ms=inferred_ms,
            postprocess_ms=max(0.0, (total - self._packing_s) * 1e3 - inferred_ms),
        )
        return Result(actions=actions, tokens=None, timing=timing)

    def reset(self) -> None:
        """Start an episode: a new connection, since the protocol has no reset. The next ``infer`` opens it."""
        self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def latency(self) -> dict[str, float]:
        """Milliseconds of the last answered calls, as the caller saw them."""
        statistics = {"calls": float(len(self._seconds)), "reconnects": float(self.reconnects)}
        if self._seconds:
            p50, p99, most = np.percentile(np.array(self._seconds) * 1e3, (50, 99, 100)).tolist()
            statistics |= {"p50_ms": p50, "p99_ms": p99, "max_ms": most}
        return statistics

    def _ask(self, message: Mapping[str, Any], deadline: float) -> Any:
        again = self._connection is not None  # a new connection is not retried
        try:
            return self._exchange(message, deadline)
        except ConnectionClosed:
            if not again:
                raise NoAction(f"the connection to {self.url} was lost before an answer came") from None
        self.close()
        self.reconnects += 1
        return self._ask(message, deadline)

    def _exchange(self, message: Mapping[str, Any], deadline: float) -> Any:
        connection = self._connection or self._connect(deadline - monotonic())
        begun = perf_counter()
        packed = arrays.pack(dict(message))
        self._packing_s = perf_counter() - begun
        try:
            answer = connection.ask(packed, deadline - monotonic())
        except TimeoutError:
            raise NoAction(f"{self.url} has not answered within {self.timeout_s:g} s") from None
        if isinstance(answer, str):
            raise NoAction(f"{self.url} refused: {' '.join(answer.split())[:1000]}")
        return _unpack(answer)

    def _connect(self, seconds: float) -> WebSocket:
        """Raises NoAction."""
        deadline = monotonic() + seconds
        self.close()
        try:
            self._connection = connection = WebSocket(self.url, self._tls, self._headers, LARGEST, seconds)
            metadata = connection.receive(deadline - monotonic())
        except (OSError, WebSocketException, ValueError) as error:  # including timeouts and malformed URLs
            self.close()
            raise NoAction(f"expected an openpi server at {self.url}, found: {error or 'no answer'}") from None
        unpacked = None if isinstance(metadata, str) else _unpack(metadata)
        if not isinstance(unpacked, dict):
            self.close()
            raise NoAction(f"expected an openpi server at {self.url}, found no metadata in its first message")
        self.metadata = unpacked
        return connection


def _load_authority(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:
        why = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "no certificate"
        raise UserError(f"expected a PEM file with a certificate at {authority}, found: {why}; give another") from None


def _unpack(answer: bytes) -> Any:
    try:
        return arrays.unpack(answer)
    except UserError as error:
        raise NoAction(f"the server's answer: {error}") from None


def _check_actions(answer: Any) -> Any:
    actions = answer.get("actions") if isinstance(answer, dict) else None
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
        raise NoAction("expected actions (horizon, dim) from the server, found none")
    if not np.isfinite(actions).all():
        raise NoAction("expected finite actions from the server, found nan or inf")
    return actions.astype(np.float32)  # a copy: unpacked arrays are read-only


def _find_infer_ms(answer: dict[Any, Any]) -> float:
    for name in ("policy_timing", "server_timing"):
        timing = answer.get(name)
        if isinstance(timing, dict) and isinstance(timing.get("infer_ms"), (int, float)):
            return float(timing["infer_ms"])
    return 0.0
