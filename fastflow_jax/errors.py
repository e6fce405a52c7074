"""Errors that end a command with one message."""

_LONGEST = 1000  # characters of a line of a message


class InputError(ValueError):
    """Invalid input from the user. The message names the problem and its remedy.

    `main.py` prints the message without a traceback and exits with status 2. A message may quote a
    file, so it is shown as by `printable`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Returns a text with characters escaped that control a terminal, and with long lines cut.

    A line of more than 1,000 characters keeps its beginning and its end.
    """
    lines = (
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        for line in text.split("\n")
    )
    return "\n".join(
        line if len(line) <= _LONGEST else f"{line[:700]} ... {line[-250:]}" for line in lines
    )


def reason(error: Exception) -> str:
    """Returns a short, printable description of the error that a damaged file caused."""
    return ascii(str(error) or type(error).__name__)[1:-1][:200].rstrip(" ,.")


class Interrupted(Exception):
    """Raised after SIGTERM or SIGINT when the training is saved; the same command continues it."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"interrupted {where}")
        self.exit_code = 128 + signum
