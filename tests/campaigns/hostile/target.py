"""A reader of files, its valid files, and what is expected of it."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

from hostile.mutation import Change


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader to try.

    `read` reads a case in the current directory, which is empty and its own. It returns, or raises
    an InputError; any other exception is a finding, and so is an AssertionError about the result.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]  # valid files
    change: Change
    read: Callable[[bytes], object]
    modules: tuple[str, ...]  # of fastflow_jax: those whose coverage guides and is stated
    # Audit events that are not refused, because the reader needs them.
    allowed: Collection[str] = ()
    # Writes what a command needs to the current directory, and returns its words, given the path of
    # a case; None if no command is tried.
    command: Callable[[str], list[str]] | None = None
    cases: int = 25  # of the short form
    suffix: str = ""  # of the file that `command` reads
