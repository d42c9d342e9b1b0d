"""The two exceptions that end a command with one line: an error of the user's, and a signal."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can correct. The command line prints it in one line and exits with code 2.

    The message is one line: what was expected, what was found, what to do about it.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. The message says how to resume it."""

    def __init__(self, message: str = "", code: int = 130) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def by(cls, error: KeyboardInterrupt, message: str) -> Interrupted:
        """The same interruption with a message."""
        return cls(message, getattr(error, "code", 130))
