"""The error for problems that a user can fix."""


class InputError(ValueError):
    """Invalid input from the user. The message names the problem and its remedy.

    `main.py` prints the message without a traceback and exits with status 2.
    """
