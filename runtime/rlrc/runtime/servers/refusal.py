"""Why a client gets no actions."""

from __future__ import annotations


class RequestRefused(Exception):
    """The one-line reply to a request that gets no actions. ``kind`` labels the metric and the log record."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ClientGone(RequestRefused):
    """The client disconnected before its turn. Nothing is computed, and no reply can be sent."""

    def __init__(self) -> None:
        super().__init__("gone", "expected a connected client, found it gone")
