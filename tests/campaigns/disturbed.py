"""Commands that meet a full disk, missing permissions, signals, each other, and odd clocks.

Each trial disturbs a command once per case. The command must succeed or end with one message. The
same command, without the disturbance, must then end with the files of an undisturbed one.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import numpy as np
import processes
from campaign import Options, Skipped
from stages import STAGES, Place, Stage, place, refusal

_NOBODY, _CAP_DAC_OVERRIDE = 65534, 1
_LONG = 3600.0  # seconds until the demo counts as hanging
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL on clusters
_DAY = 86_400


def _cases(
    options: Options, names: tuple[str, ...], long: int
) -> Iterator[tuple[Place, str, Stage, np.random.Generator, dict[str, str], float]]:
    """Yields the stages in turns: the first one in the short form, `long` cases in the long one."""
    here = place()
    for i in range(options.number(short=1, long=long)):
        name = names[i % len(names)]
        rng = np.random.default_rng([options.seed, i])
        yield here, name, STAGES[name], rng, *here.reference(STAGES[name])


def _named(name: str, about: str, found: str | None) -> str | None:
    return found and f"{name}, {about}: {found}"


@contextlib.contextmanager
def _small_disk(folder: pathlib.Path, size: int) -> Iterator[Callable[[], None]]:
    """Mounts a file system of a size at a directory; yields a function that makes room."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no file system can be mounted: {done.stderr.strip()}")
    grow = ["mount", "-o", "remount,size=256m", str(folder)]
    try:
        yield lambda: subprocess.run(grow, check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(options: Options) -> Iterator[str | None]:
    """The disk of the output has too little room, then enough."""
    if os.getuid() != 0:
        raise Skipped("only root can mount a file system")
    names = ("prediction", "feature caching", "training", "data preparation", "export")
    for here, name, stage, rng, expected, _ in _cases(options, names, 10):
        case, size = here.new_case(stage), 4096 * int(rng.integers(1, 80))
        with _small_disk(case / stage.output, size) as make_room:
            found = refusal(here.start(stage, case))
            if found is None:
                make_room()
                (case / "log").unlink()
                found = here.again(stage, case, expected)
        yield _named(name, f"{size} bytes of disk", found)


def _without_override() -> None:
    """Makes permissions apply to this process although it is root.

    It can still read everything, as Python may be in a directory that others cannot read.
    """
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, sets)
    sets[0] &= ~(1 << _CAP_DAC_OVERRIDE)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _give_away(path: pathlib.Path) -> None:
    """Makes another user the owner of a directory and all that is in it."""
    for each in (path, *path.rglob("*")):
        os.chown(each, _NOBODY, _NOBODY)


def _need_root() -> None:
    if os.getuid() != 0:
        raise Skipped("only root can change the owner of files")


def read_only(options: Options) -> Iterator[str | None]:
    """The directory of the output belongs to another user, then to this one."""
    _need_root()
    names = ("prediction", "training", "export", "update", "data preparation")
    for here, name, stage, _, expected, _ in _cases(options, names, 5):
        case = here.new_case(stage)
        (case / "log").touch()
        _give_away(case)
        os.chown(case / "log", 0, 0)
        command = here.start(stage, case, prepare=_without_override)
        found = refusal(command)
        if found is None and "error: " not in command.text:
            found = "no message"
        if found is None:
            (case / "log").unlink()
            found = here.again(stage, case, expected)
        yield _named(name, "a directory of another user", found)


def _at_home(home: str) -> None:
    """Caches programs where users have them, in a directory that may be another user's."""
    os.environ["HOME"] = home
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    _without_override()


def foreign_cache(options: Options) -> Iterator[str | None]:
    """The home directory, or the cache in it, belongs to another user."""
    _need_root()
    for here, name, stage, _, expected, _ in _cases(options, ("prediction",), 1):
        home = here.folder / "home"
        for foreign in (None, home / ".cache/fastflow_jax", home):
            case = here.new_case(stage)
            home.mkdir(exist_ok=True)
            if foreign is not None:
                _give_away(foreign)
            prepare = functools.partial(_at_home, str(home))
            command = here.start(stage, case, prepare=prepare)
            found = here.finished(stage, case, command, expected)
            yield _named(name, f"{foreign} of another user", found)
        shutil.rmtree(home)


def removed(options: Options) -> Iterator[str | None]:
    """The directory of the output is removed while the command runs."""
    names = ("prediction", "training", "feature caching", "export", "data preparation")
    for here, name, stage, rng, expected, seconds in _cases(options, names, 10):
        case, moment = here.new_case(stage), rng.uniform(0, seconds)
        command = here.start(stage, case)
        command.watch(moment)
        shutil.rmtree(case / stage.output, ignore_errors=True)
        found = refusal(command)
        if found is None:
            shutil.rmtree(case)
            case.mkdir()
            stage.before(here.shared, case)
            found = here.again(stage, case, expected)
        yield _named(name, f"directory removed after {moment:.2f} s", found)


def clock(options: Options) -> Iterator[str | None]:
    """The clock is set back by a day after a kill: all files are from tomorrow."""
    names = ("training", "feature caching", "data preparation", "update", "prediction")
    for here, name, stage, rng, expected, seconds in _cases(options, names, 5):
        case, moment = here.new_case(stage), rng.uniform(0.3, 1) * seconds
        command = here.start(stage, case)
        command.watch(moment)
        command.send(signal.SIGKILL)
        command.status()
        tomorrow = time.time() + _DAY
        for path in case.rglob("*"):
            os.utime(path, (tomorrow, tomorrow))
        found = here.again(stage, case, expected)
        yield _named(name, f"clock set back after {moment:.2f} s", found)


def few_files(options: Options) -> Iterator[str | None]:
    """A process may open 256 files."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, 256))
    yield from _limited(options, limit, "256 open files")


def little_memory(options: Options) -> Iterator[str | None]:
    """A process may have 2 GiB of data in memory."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_DATA, (2**31, 2**31))
    yield from _limited(options, limit, "2 GiB of memory")


@contextlib.contextmanager
def _container(size: int) -> Iterator[pathlib.Path]:
    """Makes a control group with a limit of memory; yields the file that processes join it by."""
    root = pathlib.Path("/sys/fs/cgroup")
    is_first = (root / "memory").is_dir()  # version 1
    group = root / "memory/campaign" if is_first else root / "campaign"
    limit = "memory.limit_in_bytes" if is_first else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(size))
    except OSError as error:
        raise Skipped(f"no control group can be made: {error}") from error
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def _join(file: pathlib.Path) -> None:
    file.write_text(str(os.getpid()))


def container(options: Options) -> Iterator[str | None]:
    """The demo in a container of 2 GiB finishes, or says what to reduce."""
    if not options.long:
        raise Skipped("it takes minutes")
    words = ["train", "--config=demo", f"--workdir={options.folder / 'run'}"]
    with _container(2 * 2**30) as file:
        how = {"prepare": functools.partial(_join, file)}
        command = processes.start(words, options.folder / "log", **how)
        yield refusal(command, _LONG)
    finished = (options.folder / "run/results.json").exists()
    options.figures["finished"] = finished


def no_locks(options: Options) -> Iterator[str | None]:
    """The file system has no `flock`."""
    yield from _limited(options, _without_flock, "no flock")


def _without_flock() -> None:
    def flock(file, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock


def _limited(options: Options, prepare: Callable[[], None], about: str) -> Iterator[str | None]:
    """Commands that must succeed although a limit was set."""
    for here, name, stage, _, expected, _ in _cases(options, ("prediction", *STAGES), 8):
        case = here.new_case(stage)
        command = here.start(stage, case, prepare=prepare)
        yield _named(name, about, here.finished(stage, case, command, expected))


def terminated(options: Options) -> Iterator[str | None]:
    """SIGTERM at a random moment, and SIGKILL after 10 s, as clusters send them."""
    names = ("prediction", "training", "feature caching", "update", "export", "data preparation")
    for here, name, stage, rng, expected, seconds in _cases(options, names, 12):
        case, moment = here.new_case(stage), rng.uniform(0.1, 1) * seconds
        command = here.start(stage, case)
        command.watch(moment)
        command.send(signal.SIGTERM)
        status = command.status(_GRACE)
        found = None
        if status is None:
            found = f"it did not end within {_GRACE:g} s: {command.text[-300:]}"
        elif status not in (128 + signal.SIGTERM, *stage.statuses, -signal.SIGTERM):
            found = f"status {status}: {command.text[-500:]}"
        (case / "log").unlink(missing_ok=True)
        found = found or here.again(stage, case, expected)
        yield _named(name, f"SIGTERM after {moment:.2f} s", found)


def together(options: Options) -> Iterator[str | None]:
    """Two processes run the same command in the same directory."""
    names = ("prediction", "training", "data preparation", "export", "update", "feature caching")
    for here, name, stage, rng, expected, seconds in _cases(options, names, 12):
        case = here.new_case(stage)
        first = here.start(stage, case)
        first.watch(rng.uniform(0, seconds))
        second = here.start(stage, case)
        ends = [command.status() for command in (first, second)]
        found = f"statuses {ends}: {first.text[-1000:]}"
        if "Traceback" not in first.text and set(ends) <= {2, *stage.statuses}:
            found = here.again(stage, case, expected)
        yield _named(name, "two processes", found)
