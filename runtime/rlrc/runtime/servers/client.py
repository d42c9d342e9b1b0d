"""A policy that runs elsewhere: openpi's protocol, of `rlrc serve` or of any openpi server.

    with RemotePolicy("ws://10.0.0.2:8000", token="...") as policy:
        chunk = policy.infer(observation)["actions"]       # as rlrc.runtime.inference.policy takes observations
        policy.latency()                                   # {"calls", "reconnects", "p50_ms", "p99_ms", "max_ms"}

An answer that does not come in time never comes: the connection is given up with it, so that no later observation is
answered by it.
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
from rlrc.runtime.wire.ports import LARGEST, checked
from rlrc.runtime.wire.websocket import WebSocket

KEPT = 10_000  # latencies that the statistics are over, the last ones


class RemotePolicy:
    """A Policy. ``timeout_s``: the longest that ``infer`` takes, a new connection included.

    ``keys``: pairs of a name of ours and what the server calls it, where that is not `rlrc serve` with its own names.
    ``authority``: a PEM file with the certificate to trust, for wss. Raises UserError if nobody answers at ``url``
    within ``connect_s``, which a server that loads its policy may need.
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
                f"expected a URL ws:// or wss:// and a time above 0 s, found {url} and {timeout_s}; give such"
            )
        self.url, self.timeout_s, self._keys = url, timeout_s, dict(keys or {})
        self._headers = {} if token is None else {"Authorization": f"Api-Key {checked(token, 'token')}"}
        self._tls = _trusting(authority) if url.startswith("wss://") else None
        self._connection: WebSocket | None = None
        self._seconds: deque[float] = deque(maxlen=KEPT)
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
        """Raises NoAction for what the server refuses, and if it does not answer in time.

        A connection that is lost is opened anew, and the observation sent once more. What the server needed counts as
        decoder in the timing, the way there and back as postprocessing.
        """
        begun = perf_counter()
        deadline = monotonic() + self.timeout_s
        message = {self._keys.get(name, name): value for name, value in observation.items()}
        try:
            answer = self._asked(message, deadline)
            actions = _actions(answer)
        except BaseException:  # Ctrl-C, too: an answer to this must not be taken for one to the next
            self.close()
            raise
        total = perf_counter() - begun
        self._seconds.append(total)
        inferred_ms = _milliseconds(answer)
        timing = InferenceTiming(
            preprocess_ms=self._packing_s * 1e3,
            vision_ms=0.0,
            decoder_ms=inferred_ms,
            postprocess_ms=max(0.0, (total - self._packing_s) * 1e3 - inferred_ms),
        )
        return Result(actions=actions, tokens=None, timing=timing)

    def reset(self) -> None:
        """A new episode is a new connection, for the protocol has no word for it. The next ``infer`` opens it."""
        self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def latency(self) -> dict[str, float]:
        """Of the last calls that were answered, in milliseconds as the caller saw them."""
        told = {"calls": float(len(self._seconds)), "reconnects": float(self.reconnects)}
        if self._seconds:
            p50, p99, most = np.percentile(np.array(self._seconds) * 1e3, (50, 99, 100)).tolist()
            told |= {"p50_ms": p50, "p99_ms": p99, "max_ms": most}
        return told

    def _asked(self, message: Mapping[str, Any], deadline: float) -> Any:
        again = self._connection is not None  # one that was just opened is not opened twice
        try:
            return self._exchanged(message, deadline)
        except ConnectionClosed:
            if not again:
                raise NoAction(f"the connection to {self.url} was lost before an answer came") from None
        self.close()
        self.reconnects += 1
        return self._asked(message, deadline)

    def _exchanged(self, message: Mapping[str, Any], deadline: float) -> Any:
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
        return _unpacked(answer)

    def _connect(self, seconds: float) -> WebSocket:
        """Raises NoAction if that fails."""
        deadline = monotonic() + seconds
        self.close()
        try:
            self._connection = connection = WebSocket(self.url, self._tls, self._headers, LARGEST, seconds)
            metadata = connection.receive(deadline - monotonic())
        except (OSError, WebSocketException, ValueError) as error:  # time-outs and malformed URLs among them
            self.close()
            raise NoAction(f"expected an openpi server at {self.url}, found: {error or 'no answer'}") from None
        unpacked = None if isinstance(metadata, str) else _unpacked(metadata)
        if not isinstance(unpacked, dict):
            self.close()
            raise NoAction(f"expected an openpi server at {self.url}, found one that does not begin with its metadata")
        self.metadata = unpacked
        return connection


def _trusting(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:
        why = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "no certificate"
        raise UserError(f"expected a PEM file with a certificate at {authority}, found: {why}; give another") from None


def _unpacked(answer: bytes) -> Any:
    try:
        return arrays.unpack(answer)
    except UserError as error:
        raise NoAction(f"the server's answer: {error}") from None


def _actions(answer: Any) -> Any:
    actions = answer.get("actions") if isinstance(answer, dict) else None
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
        raise NoAction("expected actions (horizon, dim) from the server, found none")
    if not np.isfinite(actions).all():
        raise NoAction("expected finite actions from the server, found nan or inf")
    return actions.astype(np.float32)  # a copy: what was unpacked is read-only


def _milliseconds(answer: dict[Any, Any]) -> float:
    for name in ("policy_timing", "server_timing"):
        timing = answer.get(name)
        if isinstance(timing, dict) and isinstance(timing.get("infer_ms"), (int, float)):
            return float(timing["infer_ms"])
    return 0.0
