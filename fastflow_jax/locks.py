"""Exclusive use of a directory by one process, where the file system has locks."""

import contextlib
import errno
import fcntl
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def lock(file: pathlib.Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Holds an exclusive lock on a file, which is created, until the context ends.

    A file system without locks (NFS with `nolock`, Lustre without `flock`, some FUSE mounts) is
    used without one, with one warning on stderr.

    Args:
      file: in the directory to be locked.
      on_wait: called if another process has the lock. It raises, or the lock is waited for.

    Yields:
      Whether the lock is held.

    Raises:
      OSError: the file cannot be written, or the disk is full.
    """
    with file.open("w") as opened:

        def flock(operation: int) -> bool:
            try:
                fcntl.flock(opened, operation)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.ENOSPC, errno.EDQUOT):
                    raise
                _warn(file.parent, error.strerror)
                return False
            return True

        try:
            is_held = flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            is_held = flock(fcntl.LOCK_EX)
        yield is_held


@functools.cache
def _warn(folder: pathlib.Path, reason: str) -> None:
    tqdm.write(
        f"warning: {folder} cannot be locked ({reason}). Do not let two processes use it at the "
        "same time.",
        file=sys.stderr,
    )
