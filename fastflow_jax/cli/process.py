"""The process of a command: its streams, signals, cache of compiled programs, and its end."""

import contextlib
import io
import logging
import os
import pathlib
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_CACHE_BYTES = 2**30  # of compiled programs


def open_streams() -> None:
    """Makes stdout and stderr accept any text, and discards it where they are closed."""
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w")  # noqa: SIM115  open until the process ends
        for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid text


def show(text: str) -> None:
    """Prints a text. The reader of stdout may end before it has read all of it, as `head` does."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def set_up_stderr(*, quiet: bool) -> None:
    """Shows messages of this package on stderr, between progress bars, unless `quiet`."""
    from tqdm import tqdm

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            with contextlib.suppress(OSError):  # the reader of stderr may have ended
                tqdm.write(level + record.getMessage(), file=sys.stderr)

    logger = logging.getLogger("fastflow_jax")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.handlers, logger.propagate = [Handler()], False
    if quiet or os.environ.get("TQDM_DISABLE"):
        # tqdm reads the variable when it is imported, and prefers the argument `disable` to it.
        init = tqdm.__init__

        def disabled(self, *args, **kwargs) -> None:
            init(self, *args, **kwargs | {"disable": True})

        tqdm.__init__ = disabled


def cache_programs() -> None:
    """Makes JAX cache compiled programs on disk, see `commands.overview`."""
    import jax

    from fastflow_jax.files import delete_oldest

    directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not directory.is_absolute():  # the XDG specification ignores relative paths
        try:
            directory = pathlib.Path("~/.cache").expanduser()
        except RuntimeError:  # a user without a home directory
            return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        delete_oldest(directory / "fastflow_jax", MAX_CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(directory / "fastflow_jax"))


def check_device() -> None:
    """Raises InputError if JAX finds no device."""
    from fastflow_jax import parallel
    from fastflow_jax.errors import InputError

    try:
        parallel.device_description()
    except Exception as error:  # of JAX or of a driver
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"JAX found no device for JAX_PLATFORMS={platforms!r} ({reason}). Unset it, or install "
            "JAX for that device: pip install 'fastflow-jax[cuda]' or 'fastflow-jax[tpu]'."
        ) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards stdout and stderr, for all processes but the first one."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def handle_signals() -> None:
    """Makes SIGINT and SIGTERM raise KeyboardInterrupt(signal number) in the main thread.

    Python ignores exceptions in finalizers and in callbacks of the garbage collector, which JAX
    uses. In these cases SIGALRM raises the exception again a moment later.
    """
    number = 0  # the last signal

    def interrupt(signum: int, frame: types.FrameType | None) -> None:
        nonlocal number
        number = number if signum == signal.SIGALRM else signum
        if frame is not None and frame.f_code in (hook.__code__, interrupt.__code__):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            raise KeyboardInterrupt(number)

    def hook(ignored: Any) -> None:
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            sys.__unraisablehook__(ignored)

    sys.unraisablehook = hook
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, interrupt)


def status(stop: KeyboardInterrupt) -> int:
    """The exit status of an interrupted process."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def fail(message: str, code: int, *, at_once: bool = False) -> NoReturn:
    """Ends with a message and a status; `at_once` does not wait for threads or processes."""
    print(f"error: {message}", file=sys.stderr)
    if at_once:
        with contextlib.suppress(OSError):  # its reader may have ended
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
