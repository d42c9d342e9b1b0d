"""Health, readiness and metrics, the same on every HTTP port."""

from __future__ import annotations

from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire.metrics import CONTENT_TYPE
from rlrc.runtime.wire.ports import Access


def status(path: str, session: Session, access: Access, authorization: str | None) -> tuple[int, str, str] | None:
    """(HTTP status, body, content type) of /healthz, /readyz and /metrics; None for other paths.

    A server is ready when its policy is loaded, verified and warmed up, and nothing has stopped it. Only the metrics
    need the token.
    """
    path, plain = path.partition("?")[0], "text/plain; charset=utf-8"
    if path == "/healthz":
        return 200, "OK\n", plain
    if path == "/readyz":
        reason = explain_unready(session)
        return (200, "ready\n", plain) if reason is None else (503, f"{reason}\n", plain)
    if path != "/metrics":
        return None
    if not access.allows(authorization):
        return 401, "expected a token\n", plain
    gauges = {
        "rlrc_ready": float(explain_unready(session) is None),
        "rlrc_observations_waiting": float(session.waiting),
        "rlrc_guard_stopped": float(session.latch.reason is not None),
    }
    return 200, session.metrics.text(**gauges), CONTENT_TYPE


def explain_unready(session: Session) -> str | None:
    """Why the server is not ready; None: it is."""
    if session.inference.failure is not None:
        return "failed"
    if session.draining:
        return "ending"
    if not session.inference.opened.is_set():
        return "loading"
    return None if session.latch.reason is None else "stopped"
