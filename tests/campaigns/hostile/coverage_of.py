"""Line coverage of modules while a function runs, as the feedback of a campaign."""

import contextlib
import importlib
import pathlib
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any


class Coverage:
    """Lines of some modules that were reached, and the steps from line to line."""

    def __init__(self, modules: Sequence[str]):
        self._files = {importlib.import_module(name).__file__ for name in modules}
        self._last: dict[int, int] = {}  # line that a thread executed last
        self._steps: set[tuple[str, int, int]] = set()
        self._functions: dict[types.CodeType, set[int]] = {}  # and the lines reached in each

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measures the context, and threads that it starts."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    @property
    def n_steps(self) -> int:
        """Number of different steps; it grows when a case does something new."""
        return len(self._steps)

    def lines(self) -> dict[str, bool]:
        """Whether each line of the functions that ran was reached, by file and number."""
        return {
            f"{pathlib.Path(code.co_filename).name}:{line}": line in reached
            for code, reached in self._functions.items()
            for line in {line for _, _, line in code.co_lines() if line} - {code.co_firstlineno}
        }

    def _enter(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        self._functions.setdefault(code, set())
        return self._step

    def _step(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            thread = threading.get_ident()
            line = frame.f_lineno
            self._functions[frame.f_code].add(line)
            self._steps.add((frame.f_code.co_filename, self._last.get(thread, 0), line))
            self._last[thread] = line
        return self._step
