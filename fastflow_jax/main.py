"""python -m fastflow_jax.main --config=configs/demo.py [--config.seed=1 ...] [--workdir=DIR].

python -m fastflow_jax.main --mode=predict --workdir=DIR --input=photos/new --output=out
"""

import contextlib
import itertools
import logging as std_logging
import os
import pathlib
import runpy
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Experiment, as configs/demo.py or configs/demo.py:poly", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder; unset: runs/<config>-<argument>-<backbone>"
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes share the run, as a TPU pod, Slurm or MPI starts them"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "The same where nothing tells of them: HOST:PORT of the first,"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many there are,")
_PROCESS = flags.DEFINE_integer("process", None, "and which of them this is, from 0 on")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "describe", "predict"],
    "What to do. predict: look at --input with what lies in --workdir, and write to --output; it "
    "exits with 0 if all images are normal, 1 if some are anomalous, 2 if it failed, 3 if some "
    "images could not be read, 4 if there is no threshold to decide by",
)
_INPUT = flags.DEFINE_string("input", None, "predict: a file, a folder or a glob pattern")
_OUTPUT = flags.DEFINE_string("output", None, "predict: the folder that gets the results")
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "predict: weight file of the backbone, if it has moved since the training"
)
_RATE = flags.DEFINE_float(
    "false_alarm_rate", None, "predict: part of normal images that may be called anomalous"
)
_TILE = flags.DEFINE_bool("tile", False, "predict: cut images larger than the input into tiles")
_HEATMAPS = flags.DEFINE_bool("heatmaps", True, "predict: draw heat maps")
_RAW = flags.DEFINE_enum("raw", None, ["npy", "png16"], "predict: write anomaly maps too")


def main(argv: list[str]) -> int:
    """Read the flags, call one function; returns the exit status."""
    # Imported here, so that --help answers at once.
    import jax
    import PIL.Image

    from fastflow_jax import parallel
    from fastflow_jax.config import fill
    from fastflow_jax.errors import InputError
    from fastflow_jax.files import expanded
    from fastflow_jax.runs import describe, experiment

    # What it warns of is refused, with the same figures: see `data.transforms`.
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
    # Orbax tells of every file and, before it raises, of every failure with its stacks.
    logging.set_verbosity(logging.FATAL)
    _log_to_stderr()
    distributed = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _DISTRIBUTED.value or any(flag is not None for flag in distributed):
        parallel.start(*distributed)
    if len(argv) > 1:
        raise InputError(f"unknown argument {argv[1]!r}: flags begin with two dashes")
    for flag in (_WORKDIR, _INPUT, _OUTPUT):
        if flag.value == "":
            raise InputError(f"--{flag.name} is empty: give a folder, or leave it out")
    is_predicting = _MODE.value == "predict"
    if _WEIGHTS.value is not None and not is_predicting:
        raise InputError("--weights is for --mode=predict. Pass --config.weights=FILE instead.")
    if _CONFIG.value is None and not is_predicting:
        raise InputError("name an experiment, such as --config=configs/demo.py")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (cache := _cache_directory()):
        jax.config.update("jax_compilation_cache_dir", str(cache / "fastflow_jax"))
    _check_device()
    if is_predicting:
        return _predict()
    config = fill(_CONFIG.value)
    if _MODE.value == "describe":
        print(describe.describe(config))
    else:
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = _WORKDIR.value
        workdir = experiment.default_workdir(name, config) if workdir is None else expanded(workdir)
        with contextlib.nullcontext() if parallel.is_main() else _silence():
            experiment.run(config, workdir)
    return 0


def _cache_directory() -> pathlib.Path | None:
    """The user's cache directory, so that programs are compiled once; None if there is none."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():  # other values count as unset, says the XDG specification
        return cache
    try:
        return pathlib.Path("~/.cache").expanduser()
    except RuntimeError:  # a user without a home directory
        return None


def _check_device() -> None:
    from fastflow_jax import parallel
    from fastflow_jax.errors import InputError

    try:
        parallel.device_description()
    except Exception as error:  # of JAX or of the driver of the device
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"JAX found no device for JAX_PLATFORMS={platforms!r} ({reason}). Unset it, or install "
            "JAX for that device: pip install 'fastflow-jax[cuda]' or 'fastflow-jax[tpu]'."
        ) from error


def _log_to_stderr() -> None:
    """Shows warnings of this package, between progress bars; those of other packages are not."""
    from tqdm import tqdm

    class Handler(std_logging.Handler):
        def emit(self, record: std_logging.LogRecord) -> None:
            tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)

    logger = std_logging.getLogger("fastflow_jax")
    logger.setLevel(std_logging.WARNING)
    logger.handlers, logger.propagate = [Handler()], False


def _predict() -> int:
    from fastflow_jax.errors import InputError
    from fastflow_jax.predict import predict

    if _CONFIG.value is not None:
        raise InputError(
            "--mode=predict reads the configuration of the run. Leave --config out, and pass a "
            "weight file that has moved as --weights=FILE."
        )
    for flag in (_WORKDIR, _INPUT, _OUTPUT):
        if flag.value is None:
            raise InputError(f"--mode=predict needs --{flag.name}: see --help")
    return predict(
        _WORKDIR.value,
        _INPUT.value,
        _OUTPUT.value,
        weights=_WEIGHTS.value,
        rate=_RATE.value,
        tile=_TILE.value,
        heatmaps=_HEATMAPS.value,
        raw=_RAW.value,
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Of several processes one prints and draws bars; errors leave this context first."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _run(argv: list[str]) -> int:
    """`main`; what a user can put right ends in one message and a status, not in a traceback."""
    from fastflow_jax import parallel
    from fastflow_jax.errors import InputError
    from fastflow_jax.files import remedy
    from fastflow_jax.training.loop import Interrupted

    try:
        return main(argv)
    except InputError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        _fail(f"{stop}; the same command goes on from there", stop.exit_code)
    except KeyboardInterrupt as stop:
        where = {"predict": "with the images that are left"}
        rest = where.get(_MODE.value, "from the last checkpoint, if any")
        message = f"interrupted; the same command continues {rest}"
        _fail(message, _status(stop), at_once=True)  # a thread of JAX may still be at work
    except Exception as error:
        if remedy(error):
            where = _OUTPUT if _MODE.value == "predict" else _WORKDIR
            _fail(f"{error}: {remedy(error)}, or choose another --{where.name}", 2)
        if _MODE.value == "predict":  # else Python's status would say that some are anomalous
            traceback.print_exc()
            return 2
        if not parallel.is_lost(error):
            raise
        reason = str(error).splitlines()[0]
        message = (
            f"another process of this run has ended, or a device has failed ({reason}); start all "
            "again, and they go on from the last checkpoint"
        )
        _fail(message, 1, at_once=True)  # JAX would wait for the other one


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; a misspelt field of the configuration is named with its neighbours."""
    from fastflow_jax.config import misspelt
    from fastflow_jax.errors import InputError

    words = [word for a in argv for word in a.split("=", 1)]  # --config=FILE or --config FILE
    given = [b for a, b in itertools.pairwise(words) if a in ("--config", "-config")]
    file, _, argument = given[-1].partition(":") if given else ("", "", "")
    if given and not pathlib.Path(file).is_file():
        _fail(
            f"there is no configuration {file} in {os.getcwd()}: name a file such as "
            "configs/demo.py of the checkout",
            2,
        )
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        message = str(error)
        if error.flagname == "config.weights":
            message = "--config.weights needs --config. For --mode=predict, pass --weights=FILE."
        _fail(message, 2)
    except (flags.Error, InputError) as error:
        # What a configuration file raises comes with a traceback before it.
        _fail(str(error).rpartition(f"{InputError.__name__}: ")[2].strip(), 2)
    except (AttributeError, KeyError):
        config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
        message = misspelt(config, argv)
        if message is None:
            raise
        _fail(message, 2)


def handle_signals() -> None:
    """Makes SIGINT and SIGTERM raise KeyboardInterrupt(signal number) in the main thread.

    Python ignores an exception in a finalizer or in a callback of the garbage collector, and JAX
    has such callbacks. SIGALRM raises it again then, a moment later.
    """
    number = 0  # of the last signal

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


def _status(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that this has ended."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def _fail(message: str, code: int, *, at_once: bool = False) -> NoReturn:
    """End with a message and a status; `at_once` does not wait for threads or other processes."""
    print(f"error: {message}", file=sys.stderr)
    if at_once:
        with contextlib.suppress(OSError):  # nobody may read it
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    # A stream that is closed is None. The name of a file may be no text.
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w")  # noqa: SIM115  as long as the process
        for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    handle_signals()
    try:
        app.run(_run, flags_parser=_parse)
    except KeyboardInterrupt as stop:  # while modules are imported, before `_run` can tell
        _fail("interrupted", _status(stop))
