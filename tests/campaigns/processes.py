"""Commands of `fastflow-jax` as processes that can be killed at any moment.

They are forked from a process that has imported the package, which saves the seconds of imports.
That process has not used JAX, whose threads do not survive a fork. Compiled programs are cached in
$JAX_COMPILATION_CACHE_DIR, if it is set.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("fastflow_jax.main", "fastflow_jax.runs.experiment", "fastflow_jax.update"),
        *("fastflow_jax.export.detector", "fastflow_jax.data.tfds.mvtec_ad", "sklearn.metrics"),
        *("array_record.python.array_record_data_source", "optax"),
        "fastflow_jax.training.checkpoints",
    ]
)
# Programs are compiled without optimisation: most of the time of a tiny run is compilation.
XLA_FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
LIMIT = 240.0  # seconds until a command counts as hanging


def _child(
    words: Sequence[str],
    log: str,
    environment: Mapping[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    os.setsid()  # the processes that it starts can be killed with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    import jax

    from fastflow_jax import main

    # JAX has read the environment when it was imported.
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    sys.argv = [main.__file__, *words]
    main.run()


@dataclasses.dataclass
class Command:
    """A command that was started."""

    process: multiprocessing.process.BaseProcess
    log: pathlib.Path  # its stdout and stderr

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Sends a signal to the command and the processes that it has started."""
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:  # it has just begun, or ended
            self.process.kill() if number == signal.SIGKILL else None

    @property
    def cpu_seconds(self) -> float | None:
        """CPU time of the command so far; None if it has ended."""
        try:
            fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        except OSError:
            return None
        return sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def watch(self, until: float = float("inf"), begun: Callable[[], bool] = lambda: True) -> float:
        """Waits until the command has used CPU time after it has begun; returns how much it had.

        Moments of CPU time, unlike those of a clock, do not depend on other programs.

        Args:
          until: seconds.
          begun: whether the command has begun with what counts.
        """
        first, last, deadline = None, 0.0, time.monotonic() + LIMIT
        while self.is_running and time.monotonic() < deadline:
            used = self.cpu_seconds
            if first is None and begun():
                first = used
            if used is not None and first is not None:
                last = used - first
            if last >= until:
                break
            time.sleep(0.005)
        return last

    def status(self, limit: float = LIMIT) -> int | None:
        """Waits for the exit status, negative after a signal; None if it had to be killed."""
        self.process.join(limit)
        if not self.is_running:
            return self.process.exitcode
        self.send(signal.SIGKILL)
        self.process.join()
        return None


def start(
    words: Sequence[str],
    log: pathlib.Path,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Command:
    """Starts `fastflow-jax` with arguments.

    Args:
      words: the arguments.
      log: file that stdout and stderr are appended to.
      environment: variables to change.
      prepare: function of a module that the process calls first.
    """
    variables = {"XLA_FLAGS": XLA_FLAGS, "JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}
    variables |= {n: os.environ[n] for n in ("JAX_COMPILATION_CACHE_DIR",) if n in os.environ}
    variables |= environment or {}
    process = _CONTEXT.Process(target=_child, args=(list(words), str(log), variables, prepare))
    process.start()
    return Command(process, log)


def run(
    words: Sequence[str], log: pathlib.Path, environment: Mapping[str, str] | None = None
) -> tuple[int | None, float]:
    """Runs a command to its end; returns its status and seconds."""
    begin = time.perf_counter()
    return start(words, log, environment).status(), time.perf_counter() - begin
