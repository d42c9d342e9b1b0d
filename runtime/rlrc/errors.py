"""What ends a command in one line: an error that a user can cause, and a signal."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can get wrong. The command line prints it in one line and exits with code 2.

    The message is one line that says what was expected, what was found and what to do about it.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. The message says what goes on from where."""

    def __init__(self, message: str = "", code: int = 130) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def by(cls, error: KeyboardInterrupt, message: str) -> Interrupted:
        """The same interruption with a message."""
        return cls(message, getattr(error, "code", 130))
