"""A child process that tries cases, so that the parent survives those that end it."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from campaign import Skipped

_CAMPAIGNS = pathlib.Path(__file__).resolve().parents[1]


class Child:
    """A process of `worker.py`, which is started when it is needed."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, plan: dict) -> Iterator[dict]:
        """Yields what the process reports about a plan, until it is done or the process ends.

        Raises:
          Skipped: a package that the target needs is not installed.
          RuntimeError: the target refuses its valid files.
        """
        if not self.is_alive:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            entry = json.loads(line)
            if "done" in entry:
                if "skipped" in entry["done"]:
                    raise Skipped(entry["done"]["skipped"])
                if "broken" in entry["done"]:
                    raise RuntimeError(entry["done"]["broken"])
                return
            yield entry
        self._process.wait()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """The case that ended the process, and the end of its stderr.

        Raises:
          RuntimeError: it ended before it tried a case.
        """
        assert self._process is not None
        assert self._folder is not None
        folder = pathlib.Path(self._folder.name)
        words = (folder / "stderr").read_text(errors="replace")[-2000:]
        if not (folder / "current").exists():
            raise RuntimeError(f"The child process did not start: {words}")
        case = (folder / "current").read_bytes().hex()
        return f"the process ended with {self._process.returncode}: {words} | case {case}"

    def close(self) -> None:
        """Ends the process, and removes its directory."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="campaign_")
        folder = pathlib.Path(self._folder.name)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XDG_CACHE_HOME": str(folder / "case"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(_CAMPAIGNS), *sys.path]),
            "TMPDIR": str(folder / "case"),
            "TQDM_DISABLE": "1",
        }
        with (folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hostile.worker", str(folder)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
