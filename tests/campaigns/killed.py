"""Commands that are killed at a random moment, and started again."""

import functools
import pathlib
import shutil
import signal
from collections.abc import Iterator

import numpy as np
from campaign import Options
from stages import STAGES, Place, Stage, place

# Kills of the long form, 100 in all, most where most is written.
KILLS = {"training": 10, "feature caching": 14, "data preparation": 28, "calibration": 8}
KILLS |= {"export": 12, "update": 14, "prediction": 14}


def kills(name: str, options: Options) -> Iterator[str | None]:
    """Kills the command of a stage at random moments of its CPU time, and runs it again.

    The second run must end with the files of an undisturbed one.
    """
    stage, here = STAGES[name], place()
    n = options.number(short=1, long=KILLS[name])
    expected, seconds = here.reference(stage)
    rng = np.random.default_rng([options.seed, *name.encode()])
    ended = 0
    for moment in rng.uniform(0, seconds, n).tolist():
        case = here.new_case(stage)
        was_killed = _kill(here, stage, case, moment)
        ended += not was_killed
        found = here.again(stage, case, expected)
        yield found and f"{name} killed after {moment:.2f} of {seconds:.2f} s: {found}"
        if found is None:
            shutil.rmtree(case)
    options.figures["ended_before_the_kill"] = ended


def _kill(here: Place, stage: Stage, case: pathlib.Path, moment: float) -> bool:
    """Runs a command until a moment; returns whether it was still running."""
    command = here.start(stage, case)
    command.watch(moment, functools.partial(stage.begun, case))
    command.send(signal.SIGKILL)
    return command.status() == -signal.SIGKILL
