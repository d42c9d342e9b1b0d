"""The one error a user can cause. The command line prints it in one line and exits with code 2."""


class UserError(ValueError):
    """Something the user can get wrong.

    The message is one line that says what was expected, what was found and what to do about it.
    """
