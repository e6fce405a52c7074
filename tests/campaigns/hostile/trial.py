"""Tries cases on a target, in this process, and notes those that it does not survive."""

import contextlib
import io
import logging
import os
import pathlib
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from random import Random

from fastflow_jax.errors import InputError
from hostile import sandbox
from hostile.coverage_of import Coverage
from hostile.target import Target

_LONGEST = 2000  # characters of a message
_EVERY = 40  # one of this number of cases is also given to the command line


class Trial:
    """The cases of one target."""

    def __init__(self, target: Target, watch: sandbox.Watch, folder: pathlib.Path):
        """Tries every valid file once, which imports and compiles what reading needs."""
        self.target, self._watch, self._folder = target, watch, folder
        self._current = folder / "current"  # read by the parent if this process ends
        with self._in_folder():  # where temporary files are, see child.py
            self._seeds = list(target.seeds())
        self._coverage = Coverage(target.modules)
        self.n_cases = 0
        self.lost: list[str] = []  # problem and content of each case that was not survived
        self._pool = list(self._seeds)
        n_read = 0
        for seed in self._seeds:
            with contextlib.suppress(InputError), self._in_folder(), self._coverage.measured():
                target.read(seed)
                n_read += 1
        assert n_read > len(self._seeds) / 2, f"{target.name} refuses valid files"

    def run(self, seed: int, is_over: Callable[[], bool]) -> None:
        """Tries changed files; those that reach new lines are changed further."""
        rng = Random(f"{self.target.name} {seed}")
        while not is_over():
            case = rng.choice(self._pool if rng.random() < 0.7 else self._pool[-20:])
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                case = self.target.change(case, rng, self._seeds)
            before = self._coverage.n_steps
            self.check(case)
            if self._coverage.n_steps > before:
                self._pool.append(case)

    def check(self, case: bytes) -> None:
        """Tries a case, and notes what it did wrong."""
        self._current.write_bytes(case)
        self.n_cases += 1
        problem = self._problem(lambda: self.target.read(case))
        if problem is None and self.target.command and self.n_cases % _EVERY == 0:
            problem = self._problem(lambda: self._command(case))
        if problem is not None:
            self.lost.append(f"{problem.strip()} | case {case.hex()}")

    def lines(self) -> dict[str, bool]:
        """The lines of the functions that ran, and whether they were reached."""
        return self._coverage.lines()

    def _problem(self, read: Callable[[], object]) -> str | None:
        problem = None
        with self._in_folder() as folder, self._watch.over(folder, self.target.allowed):
            try:
                with sandbox.on_time(), self._coverage.measured():
                    read()
            except InputError as error:
                problem = unclear(str(error)) or _out_of_memory(error)
            except BaseException as error:
                problem = "".join(traceback.format_exception(error)[-4:])
        if self._watch.breaches:
            problem = "; ".join(self._watch.breaches)
        return problem

    def _command(self, case: bytes) -> None:
        """Reads a case by the command line, which must end with a status, without a traceback."""
        assert self.target.command is not None
        path = pathlib.Path(f"case{self.target.suffix}")
        path.write_bytes(case)
        from hostile.command import run

        run(self.target.command(str(path)))

    @contextlib.contextmanager
    def _in_folder(self) -> Iterator[pathlib.Path]:
        """Makes an empty directory the current one; removes it afterwards."""
        folder = self._folder / "case"
        folder.mkdir()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield folder
        finally:
            os.chdir(self._folder)
            _make_writable(folder)
            shutil.rmtree(folder)


def unclear(message: str) -> str | None:
    """Why a message to users is not clear, or None."""
    lines = message.splitlines()
    if not message or len(message) > _LONGEST:
        return f"a message of {len(message)} characters: {message[:100]!r}"
    if not all(line.isprintable() for line in lines):
        return f"an unprintable message: {message!r}"
    if not re.search(r"\S[.?] \S.*\.$| must |\n", message, re.S):
        return f"a message without a remedy: {message!r}"
    return None


def _out_of_memory(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, MemoryError):
            return "needs too much memory: " + "".join(traceback.format_exception(error)[-3:])
        error = error.__cause__ or error.__context__
    return None


def _make_writable(folder: pathlib.Path) -> None:
    for at, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(at, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)


def discard_messages() -> None:
    """Discards log lines, which cases cause in great number."""
    logging.disable(logging.CRITICAL)
