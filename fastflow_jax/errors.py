"""Errors that end a command with one message."""


class InputError(ValueError):
    """Invalid input from the user. The message names the problem and its remedy.

    `main.py` prints the message without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """Raised after SIGTERM or SIGINT when the training is saved; the same command continues it."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"interrupted {where}")
        self.exit_code = 128 + signum
