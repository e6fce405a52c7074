"""The child process of a campaign: reads plans from stdin, and reports on stdout.

A plan is a line of JSON: module and name of the target, corpus, seed, seconds of the long form or
null, and the number of cases that were tried before this process. A report has the number of cases
since the last one, those that were lost, and the lines that were reached or not. The last report
says if the target was skipped, or could not be tried.
"""

import importlib
import json
import os
import pathlib
import sys
import time
import traceback
from typing import Any

from hostile import sandbox
from hostile.trial import Trial, discard_messages

_REPORT_EVERY = 200  # cases


def main(folder: pathlib.Path) -> None:
    """Carries out plans until stdin ends.

    Args:
      folder: for the cases, and for the one that is being tried.
    """
    # What readers print must not be mistaken for a report.
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    discard_messages()
    watch = sandbox.Watch()
    for line in sys.stdin:
        plan = json.loads(line)
        try:
            module = importlib.import_module(plan["module"])
            (target,) = (each for each in module.TARGETS if each.name == plan["target"])
            trial = Trial(target, watch, folder)
        except ImportError as error:
            done = {"skipped": f"{error}."}
        except Exception:
            done = {"broken": traceback.format_exc()}
        else:
            with sandbox.limited():
                _carry_out(plan, trial, report)
            done = {}
        report.write(json.dumps({"done": done}) + "\n")


def _carry_out(plan: dict[str, Any], trial: Trial, report: Any) -> None:
    start, reported = time.monotonic(), 0

    def tell() -> None:
        nonlocal reported
        entry = {"cases": trial.n_cases - reported, "lost": trial.lost, "lines": trial.lines()}
        report.write(json.dumps(entry) + "\n")
        reported, trial.lost = trial.n_cases, []

    def is_over() -> bool:
        if trial.n_cases - reported >= _REPORT_EVERY:
            tell()
        if plan["seconds"] is None:
            return plan["tried"] + trial.n_cases >= trial.target.cases
        return time.monotonic() - start >= plan["seconds"]

    for case in plan["corpus"]:
        trial.check(bytes.fromhex(case))
    trial.run(plan["seed"], is_over)
    tell()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
