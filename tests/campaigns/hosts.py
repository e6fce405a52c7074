"""Trainings that several processes share: one is killed, then fewer or more of them continue."""

import json
import pathlib
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence

import numpy as np
import processes
from campaign import Options
from stages import STAGES, Place, Stage, place

# Processes that begin, and that continue. Batches are divided by them and sums are ordered
# differently, so that results are equal up to rounding.
_NUMBERS = ((2, 1), (4, 2), (2, 4), (4, 1), (2, 2), (4, 4))
_ROUNDING = 1e-3
_LIMIT = 120.0  # seconds until the others must have ended


def lost_process(options: Options) -> Iterator[str | None]:
    """Kills one process at a random moment; the others must end, and other numbers continue."""
    here, stage = place(), STAGES["training"]
    _, seconds = here.reference(stage)
    alone = here.new_case(stage)
    _together(here, stage, alone, 1)
    ended = 0
    for i in range(options.number(short=1, long=12)):
        rng = np.random.default_rng([options.seed, 2, i])
        first, then = _NUMBERS[i % len(_NUMBERS)]
        victim, moment = int(rng.integers(first)), rng.uniform(0, seconds)
        case = here.new_case(stage)
        found, was_killed = _killed(here, stage, case, first, victim, moment)
        ended += not was_killed
        found = found or _together(here, stage, case, then) or _differences(case, alone)
        about = f"process {victim} of {first} killed after {moment:.2f} s, {then} continued"
        yield found and f"{about}: {found}"
        if found is None:
            shutil.rmtree(case)
    options.figures["ended_before_the_kill"] = ended


def _start(here: Place, stage: Stage, case: pathlib.Path, n: int) -> list[processes.Command]:
    """Starts the processes of a command, each with a log of its own."""
    words = stage.words(here.shared, case)
    if n == 1:
        return [processes.start(words, case / "log_0")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    shared = [*words, address, f"--processes={n}"]
    return [processes.start([*shared, f"--process={i}"], case / f"log_{i}") for i in range(n)]


def _killed(
    here: Place, stage: Stage, case: pathlib.Path, n: int, victim: int, moment: float
) -> tuple[str | None, bool]:
    """Kills a process; returns what is wrong with the other ones, and whether it still ran."""
    started = _start(here, stage, case, n)
    started[victim].watch(moment)
    started[victim].send(signal.SIGKILL)
    was_killed = started[victim].status() == -signal.SIGKILL
    statuses = [command.status(_LIMIT) for i, command in enumerate(started) if i != victim]
    if None in statuses:
        return f"a process did not end within {_LIMIT:g} s: {_texts(started)}", was_killed
    if was_killed and 0 in statuses and not (case / "run/results.json").exists():
        return f"a process ended with status 0: {_texts(started)}", was_killed
    return None, was_killed


def _together(here: Place, stage: Stage, case: pathlib.Path, n: int) -> str | None:
    """Runs a command in n processes to its end; returns what is wrong."""
    for log in case.glob("log_*"):
        log.unlink()
    started = _start(here, stage, case, n)
    statuses = [command.status() for command in started]
    if statuses != [0] * n:
        return f"{n} processes ended with {statuses}: {_texts(started)}"
    return None


def _texts(started: Sequence[processes.Command]) -> str:
    return " | ".join(command.text[-500:] for command in started)


def _differences(case: pathlib.Path, alone: pathlib.Path) -> str | None:
    """How the results differ from those of one undisturbed process, beyond rounding."""
    names, scores = zip(*(_scores(folder / "run") for folder in (case, alone)), strict=True)
    if names[0] != names[1]:
        return f"scores of other images: {names[0]}"
    error = np.abs(scores[0] - scores[1]) / np.maximum(1, np.abs(scores[1]))
    return None if error.max() <= _ROUNDING else f"scores differ by {error.max():.1e}"


def _scores(run: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Names and scores of the test images."""
    (file,) = run.rglob("scores.json")
    images = sorted(json.loads(file.read_text())["images"], key=lambda image: image["name"])
    return [image["name"] for image in images], np.array([image["score"] for image in images])
