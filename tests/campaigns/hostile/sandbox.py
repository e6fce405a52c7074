"""Watch over readers of hostile input: what they may open, run and allocate, and for how long."""

import contextlib
import faulthandler
import os
import pathlib
import resource
import sys
import time
import types
from collections.abc import Collection, Iterator

MEMORY = 2 * 2**30  # bytes that a case may allocate
FILE = 2**28  # bytes of the largest file that a case may write
SECONDS = 10  # of CPU time that a case may take
_WALL_SECONDS = 60  # after which a case hangs, on a machine with other programs

_FORBIDDEN = frozenset(
    (
        *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn"),
        *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo"),
        *("urllib.Request", "pickle.find_class"),
    )
)
# Arguments of audit events that are paths to be written, and the one that is their directory.
_WRITTEN = {
    "os.remove": ((0,), 1),
    "os.rename": ((0, 1), None),
    "os.link": ((1,), None),
    "os.symlink": ((1,), 2),
    "os.mkdir": ((0,), 2),
    "os.rmdir": ((0,), 1),
    "os.chmod": ((0,), 2),
    "os.chown": ((0,), 3),
    "os.truncate": ((0,), None),
    "os.utime": ((0,), 3),
}


class Breach(BaseException):
    """A case did something that no reader may do. No handler of `Exception` catches it."""


class Watch:
    """Audit hook that refuses forbidden acts while a case is read."""

    def __init__(self):
        self._folder: str | None = None  # None: no case is read
        self._allowed: Collection[str] = ()
        self.breaches: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def over(self, folder: pathlib.Path, allowed: Collection[str] = ()) -> Iterator[None]:
        """Watches the context, which may write below `folder` only.

        Args:
          folder: directory of the case.
          allowed: audit events that are not refused.
        """
        self.breaches.clear()
        self._folder, self._allowed = os.path.realpath(folder), allowed
        try:
            yield
        finally:
            self._folder = None

    def _hook(self, event: str, arguments: tuple) -> None:
        if self._folder is None or event in self._allowed:
            return
        if event in _FORBIDDEN or (event == "exec" and not self._is_installed(arguments[0])):
            self._refuse(f"{event} of {arguments[0]!r:.100}")
        elif event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not self._is_inside(path, None):
                self._refuse(f"{path!r} is opened for writing")
        elif event in _WRITTEN:
            paths, at = _WRITTEN[event]
            for path in (arguments[i] for i in paths):
                if not self._is_inside(path, None if at is None else arguments[at]):
                    self._refuse(f"{event} of {path!r}")

    def _is_inside(self, path: object, directory: int | None) -> bool:
        if isinstance(path, int) or path is None:  # was opened before
            return True
        assert self._folder is not None
        base = f"/proc/self/fd/{directory}" if directory is not None and directory >= 0 else ""
        real = os.path.realpath(os.path.join(base, os.fsdecode(path)))  # type: ignore[arg-type]
        return real == os.devnull or os.path.commonpath([real, self._folder]) == self._folder

    def _is_installed(self, code: types.CodeType) -> bool:
        """Whether code is that of a file outside of the case, or is run because it is imported."""
        file = code.co_filename
        if os.path.isabs(file) and not self._is_inside(file, None):
            return True
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def _refuse(self, what: str) -> None:
        self.breaches.append(what)
        raise Breach(what)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limits the memory that the context allocates, and the size of files that it writes."""
    status = pathlib.Path("/proc/self/status").read_text()
    size = int(status.partition("VmSize:")[2].split()[0]) * 1024
    limits = {resource.RLIMIT_AS: size + MEMORY, resource.RLIMIT_FSIZE: FILE}
    limits[resource.RLIMIT_CORE] = 0  # no dump of a process that ends
    before = {kind: resource.getrlimit(kind) for kind in limits}
    try:
        for kind, limit in limits.items():
            resource.setrlimit(kind, (limit, before[kind][1]))
        yield
    finally:
        for kind, values in before.items():
            resource.setrlimit(kind, values)


@contextlib.contextmanager
def on_time() -> Iterator[None]:
    """Ends the process, with a traceback on stderr, if the context hangs.

    Raises:
      AssertionError: it took too long.
    """
    faulthandler.dump_traceback_later(_WALL_SECONDS, exit=True)
    start = time.process_time()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - start
    assert seconds <= SECONDS, f"took {seconds:.1f} s"
