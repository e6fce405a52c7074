"""What a user can put right: one exception, one clear message."""


class InputError(ValueError):
    """Bad input from the user; the message names the thing and the remedy.

    `main.py` prints the message without a traceback and exits with status 2.
    """
