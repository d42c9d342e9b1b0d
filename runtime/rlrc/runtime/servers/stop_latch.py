"""Whether chunks leave the server: the guard's stop and the operator's."""

from __future__ import annotations

import logging

from rlrc.errors import UserError
from rlrc.runtime.servers.guarded import GuardedChunks

log = logging.getLogger(__name__)


class StopLatch:
    """Stops by request or by the guard, until re-armed. ``halt`` is for any thread, the rest for the event loop."""

    def __init__(self, guarded: GuardedChunks | None) -> None:
        self._guarded = guarded
        self.lost: str | None = None
        """a stop input that no longer works; if set, ``rearm`` is refused"""
        self.halted: str | None = None
        """the reason of ``halt`` or ``stop``"""
        self._halts = 0

    @property
    def reason(self) -> str | None:
        """Why no chunk leaves; None: chunks leave."""
        return self.halted or (None if self._guarded is None else self._guarded.guard.reason)

    def halt(self, reason: str) -> None:
        """From now on, no chunk leaves. ``stop`` has to follow, in the event loop."""
        self._halts += 1
        if self.reason is None:
            log.warning("stopped: %s", reason)
        self.halted = self.halted or reason

    def stop(self, reason: str) -> None:
        """Latch: inference goes on, but no chunk leaves. A client may still execute chunks that it has received."""
        self.halt(reason)
        if self._guarded is not None and not self._guarded.guard.stopped:
            self._guarded.guard.stop(reason)

    def rearm(self, who: str) -> None:
        """Raises UserError, and stays stopped, while the cause of the stop persists."""
        if self.lost is not None:
            raise UserError(f"expected every stop input to work, found {self.lost} lost; restart the server")
        stopped, halts = self.reason, self._halts
        assert stopped is not None
        if self._guarded is not None:
            self._guarded.rearm(who)
        self.halted = None
        if self._halts != halts:  # another thread called ``halt`` meanwhile
            self.stop(stopped)
            raise UserError("expected no stop during re-arming, found one; check the cause, then re-arm")
        log.warning("re-armed by %s (was stopped: %s)", who, stopped)
