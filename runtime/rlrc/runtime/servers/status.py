"""What a server answers about itself, the same on every protocol's port: alive, ready, metrics."""

from __future__ import annotations

from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire.metrics import CONTENT_TYPE
from rlrc.runtime.wire.ports import Access


def status(path: str, session: Session, access: Access, authorization: str | None) -> tuple[int, str, str] | None:
    """(HTTP status, body, content type) of /healthz, /readyz and /metrics; None for other paths.

    Alive is a server that answers at all; ready one whose policy is loaded, verified and warmed up, and whose guard
    has not stopped. Only the metrics need the token.
    """
    path, plain = path.partition("?")[0], "text/plain; charset=utf-8"
    if path == "/healthz":
        return 200, "OK\n", plain
    if path == "/readyz":
        reason = unready(session)
        return (200, "ready\n", plain) if reason is None else (503, f"{reason}\n", plain)
    if path != "/metrics":
        return None
    if not access.allows(authorization):
        return 401, "expected a token\n", plain
    gauges = {
        "rlrc_ready": float(unready(session) is None),
        "rlrc_observations_waiting": float(session.waiting),
        "rlrc_guard_stopped": float(session.stopped is not None),
    }
    return 200, session.metrics.text(**gauges), CONTENT_TYPE


def unready(session: Session) -> str | None:
    """Why it is not ready; None if it is."""
    if session.failure is not None:
        return "failed"
    if session.draining:
        return "ending"
    if not session.opened.is_set():
        return "loading"
    return None if session.stopped is None else "stopped"
