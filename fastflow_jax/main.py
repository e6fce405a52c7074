"""Trains, evaluates, describes, applies, exports and serves anomaly detectors.

    python -m fastflow_jax.main --config=configs/demo.py [--config.seed=1 ...] [--workdir=DIR]
    python -m fastflow_jax.main --mode=predict --workdir=DIR --input=photos/new --output=out

`fastflow-jax predict ...` is the same as `python -m fastflow_jax.main --mode=predict ...`.
`cli.commands` lists the modes and the flags that each of them reads.
"""

import contextlib
import itertools
import os
import pathlib
import runpy
import sys
import traceback
import warnings
from typing import TypeGuard

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from fastflow_jax.cli import commands, configs, process
from fastflow_jax.cli.process import fail, handle_signals

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Read the configuration from this file, or the packaged one of this name, with an "
    "argument after a colon if it takes one, such as configs/demo.py, demo or demo:poly.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "With --mode=train or audit, store the run in this directory, by default "
    "runs/<config>-<argument>-<backbone>; with --mode=predict, export, migrate, serve, update, "
    "batch or submit, read the run in this directory.",
)
_QUIET = flags.DEFINE_bool(
    "quiet", False, "Show only warnings and errors on stderr, and no progress bars."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Share the run among the processes that a TPU pod, Slurm or MPI started."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Share the run among processes started by hand; process 0 is at this HOST:PORT.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "With --coordinator, share the run among this number of processes."
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "With --coordinator, give this process this index, from 0."
)
_THREADS = flags.DEFINE_integer(
    "threads", None, "Compute with this number of CPU threads, by default one per core."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(commands.COMMANDS),
    "What to do; `fastflow-jax MODE --help` describes each mode and lists its flags.",
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "With --mode=predict, batch or update, read images from this file, directory or glob pattern; "
    "with --mode=predict also videos, or - for paths on stdin, one per line, to be answered by "
    "a JSON line each on stdout; with --mode=batch also from a text, CSV, JSON lines or "
    "Parquet file; with --mode=submit, the directory of MVTec AD 2.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "With --mode=predict, batch or submit, write results to this directory, which is optional for "
    "--input=-; with --mode=export, write this file; with --mode=migrate, write this new "
    "directory or zip archive; with --mode=update, draw heat maps of images that may be defective "
    "to this directory.",
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "With --mode=predict, export, migrate, serve, update or submit, read the weights of the "
    "backbone from this file, if it has moved.",
)
_RATE = flags.DEFINE_float(
    "false_alarm_rate",
    None,
    "With --mode=predict or batch, allow this share of normal images, from 0 to 1, to be called "
    "anomalous.",
)
_PRODUCT = flags.DEFINE_string(
    "product",
    None,
    "With --mode=predict and a model of several products, all images show this one; by default "
    "each image shows the product that it is nearest to.",
)
_ROI = flags.DEFINE_string(
    "roi",
    None,
    "With --mode=predict and a detector that was trained with a mask per image, score the white "
    "pixels of this mask of all images, or of masks in this directory, named like the images.",
)
_TILE = flags.DEFINE_bool(
    "tile", False, "With --mode=predict or batch, cut images larger than the input into tiles."
)
_EVERY = flags.DEFINE_integer(
    "every",
    1,
    "With --mode=predict, score one of this number of frames of a video, from the first on.",
)
_UNDO = flags.DEFINE_bool(
    "undo", False, "With --mode=update, go back to the version before the last update."
)
_KEEP_THRESHOLD = flags.DEFINE_bool(
    "keep_threshold",
    False,
    "With --mode=update, keep the thresholds: for images that were chosen because they were "
    "flagged.",
)
_FINETUNE = flags.DEFINE_bool(
    "finetune",
    False,
    "With --mode=update, continue the training of FastFlow with the training images and a half of "
    "those in --input first, for larger shifts.",
)
_HEATMAPS = flags.DEFINE_bool("heatmaps", True, "With --mode=predict, draw heat maps.")
_RAW = flags.DEFINE_enum(
    "raw",
    None,
    ["npy", "png16"],
    "With --mode=predict or batch, write anomaly maps in this format as well.",
)

_ENGINE = flags.DEFINE_enum(
    "engine",
    None,
    ["jax", "onnx"],
    "Compute with JAX, the default of --mode=predict, or with ONNX Runtime, the default of "
    "--mode=serve, which starts faster and has no log-likelihoods and no test for a shift.",
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "onnx",
    ["onnx", "html", "stablehlo", "litert"],
    "With --mode=export, the format of the file; html is a web page that scores images, litert is "
    "experimental.",
)
_RUNTIME = flags.DEFINE_string(
    "runtime",
    None,
    "With --format=html, the npm package onnxruntime-web: the file that `npm pack onnxruntime-web` "
    "writes, or a directory.",
)
_OPSET = flags.DEFINE_integer("opset", 18, "With --mode=export, the opset of an ONNX file.")
_RESIZE = flags.DEFINE_enum(
    "resize",
    "outside",
    ["outside", "inside"],
    "With --mode=export, an ONNX file takes images of its input size, or resizes images of any "
    "size itself, which differs from Pillow by up to a grey level on photographs.",
)

_MODELS = flags.DEFINE_multi_string(
    "model",
    [],
    "With --mode=serve, serve this exported file, given as NAME=FILE, instead of --workdir; may be "
    "repeated; with --mode=batch, score with this exported FILE instead of --workdir.",
)
_SHARD = flags.DEFINE_string(
    "shard", "1/1", "With --mode=batch, score this part of the images, such as 3/16."
)
_COLUMN = flags.DEFINE_string(
    "column",
    "path",
    "With --mode=batch, the column of paths or, in Parquet files, of contents of image files.",
)
_RAY = flags.DEFINE_integer("ray", 0, "With --mode=batch, score with this number of Ray workers.")
_HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "With --mode=serve, listen on this address, by default for this machine only; requests must "
    "have the token in $FASTFLOW_TOKEN, if it is set.",
)
_PORT = flags.DEFINE_integer("port", 8000, "With --mode=serve, listen on this port.")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "With --mode=serve, score in this number of processes for each detector."
)
_BATCH = flags.DEFINE_integer(
    "batch", 1, "With --mode=serve, score up to this number of images together."
)
_LATENCY = flags.DEFINE_float(
    "latency_ms", 5.0, "With --mode=serve, let an image wait up to this time for others."
)
_QUEUE = flags.DEFINE_integer(
    "queue", 64, "With --mode=serve, refuse requests beyond this number at the same time."
)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", 32 * 2**20, "With --mode=serve, refuse requests of more bytes."
)
_FALSE_ALARMS = flags.DEFINE_string(
    "false_alarms",
    None,
    "With --mode=serve, store images that users mark as false alarms in this directory, with a "
    "sub-directory for each model; by default none are stored.",
)

_WRITERS = ("predict", "export", "migrate", "batch", "submit")  # modes that write to --output


def main(argv: list[str]) -> int:
    """Runs the mode that the flags select; returns the exit status."""
    # Imported here, so that --help answers at once.
    import PIL.Image

    # `data.transforms` raises an error at the size at which Pillow warns.
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
    # Orbax logs every file, and every failure with its traceback before it raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    process.set_up_stderr(quiet=_QUIET.value)
    _check_flags(argv)
    if _THREADS.value is not None:
        os.environ["NPROC"] = str(_THREADS.value)  # XLA reads it when it starts
    # Without JAX, which starts slowly, unless the detector must be exported first.
    if _MODE.value == "predict" and _ENGINE.value == "onnx":
        return _predict()
    if _MODE.value == "serve":
        return _serve()
    if _MODE.value == "batch":
        return _score_batch()
    if _MODE.value == "data":
        return _data()
    return _main_with_jax()


def _main_with_jax() -> int:
    from fastflow_jax import parallel
    from fastflow_jax.config import fill
    from fastflow_jax.files import expanded
    from fastflow_jax.report.table import format_table
    from fastflow_jax.runs import describe, experiment, few_images

    distributed = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _DISTRIBUTED.value or any(flag is not None for flag in distributed):
        parallel.start(*distributed)
    process.cache_programs()
    process.check_device()
    if _MODE.value == "predict":
        return _predict()
    if _MODE.value == "export":
        return _export()
    if _MODE.value == "migrate":
        return _migrate()
    if _MODE.value == "update":
        return _update()
    if _MODE.value == "submit":
        return _submit()
    assert _CONFIG.value is not None  # see `_check_flags`
    config = fill(_CONFIG.value)
    if _MODE.value == "describe":
        process.show(describe.describe(config))
    else:
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = _WORKDIR.value
        workdir = experiment.default_workdir(name, config) if workdir is None else expanded(workdir)
        config = fill(few_images.resolve(_CONFIG.value))
        if _MODE.value == "audit":
            _audit(config, workdir)
            return 0
        with contextlib.nullcontext() if parallel.is_main() else process.silence():
            results = experiment.run(config, workdir)
            print(f"\n{format_table(results)}\n\nRun directory: {workdir}")
    return 0


def _audit(config, workdir: pathlib.Path) -> None:
    """Lists normal images that look unusual, see `audit.run`."""
    from fastflow_jax import parallel
    from fastflow_jax.report.audit import format_audit
    from fastflow_jax.runs import audit

    with contextlib.nullcontext() if parallel.is_main() else process.silence():
        for found in audit.run(config, workdir):
            print(f"\n{format_audit(found)}")
        print(f"\nPictures: audit.html, names: audit.txt, in {workdir}")


def _check_flags(argv: list[str]) -> None:
    """Raises InputError for flags that are missing or do not fit the mode."""
    from fastflow_jax.errors import InputError

    if len(argv) > 1:
        raise InputError(f"The argument {argv[1]!r} is unknown. Flags begin with two dashes.")
    if _THREADS.value is not None and _THREADS.value < 1:
        raise InputError(f"--threads must be at least 1, not {_THREADS.value}.")
    for flag in (_WORKDIR, _INPUT, _OUTPUT, _RUNTIME, _ROI, _FALSE_ALARMS):
        if flag.value == "":
            raise InputError(f"--{flag.name} is empty. Pass a path, or leave the flag out.")
    if "config" in commands.COMMANDS[_MODE.value].flags:
        if _WEIGHTS.value is not None:
            raise InputError("--weights is for predictions. Pass --config.weights=FILE instead.")
        if _CONFIG.value is None and _MODE.value != "data":
            raise InputError("--config is missing. Pass, for example, --config=demo.")
    elif _CONFIG.value is not None:
        raise InputError(
            f"The command {_MODE.value} reads the configuration of the run. Leave --config out, "
            "and pass a weight file that has moved as --weights=FILE."
        )
    commands.check_flags(_MODE.value, flags.FLAGS)


def _data() -> int:
    """Lists the data sets, or prepares that of --config; returns the exit status."""
    from fastflow_jax.data import catalogue
    from fastflow_jax.runs import few_images

    if _CONFIG.value is None:
        process.show(catalogue.listing())
        return 0
    return catalogue.prepare(few_images.resolve(_CONFIG.value).data)


def _predict() -> int:
    """Predicts images, see `predict.predict`; returns the exit status."""
    from fastflow_jax.predict import STDIN, predict

    workdir, images = _needed(_WORKDIR, _INPUT)
    if images != STDIN:
        _needed(_OUTPUT)
    return predict(
        workdir,
        images,
        _OUTPUT.value,
        engine=_ENGINE.value or "jax",
        weights=_WEIGHTS.value,
        rate=_RATE.value,
        tile=_TILE.value,
        heatmaps=_HEATMAPS.value,
        raw=_RAW.value,
        product=_PRODUCT.value,
        roi=_ROI.value,
        every=_EVERY.value,
    )


def _update() -> int:
    """Teaches images to a detector, or takes that back, see `update`; returns the exit status."""
    from fastflow_jax.errors import InputError
    from fastflow_jax.update import run_undo, run_update

    if _UNDO.value:
        if _INPUT.value is not None:
            raise InputError("--undo takes no images. Leave --input out.")
        return run_undo(*_needed(_WORKDIR), weights=_WEIGHTS.value)
    return run_update(
        *_needed(_WORKDIR, _INPUT),
        output=_OUTPUT.value,
        weights=_WEIGHTS.value,
        keep_threshold=_KEEP_THRESHOLD.value,
        tune=_FINETUNE.value,
    )


def _migrate() -> int:
    """Saves the detectors of a run, see `migrate.migrate`; returns the exit status."""
    from fastflow_jax.migrate import migrate

    for path in migrate(*_needed(_WORKDIR, _OUTPUT), weights=_WEIGHTS.value):
        print(f"Saved detector: {path}")
    return 0


def _submit() -> int:
    """Writes results for the server of MVTec AD 2; returns the exit status."""
    from fastflow_jax.submission import submit

    workdir, images, output = _needed(_WORKDIR, _INPUT, _OUTPUT)
    n = submit(workdir, images, output, weights=_WEIGHTS.value)
    print(f"Results of {n} images: {output}")
    return 0


def _export() -> int:
    """Exports a detector, see `Detector.export`; returns the exit status."""
    from fastflow_jax.detector import Detector

    workdir, output = _needed(_WORKDIR, _OUTPUT)
    detector = Detector.load(workdir, weights=_WEIGHTS.value)
    parity = detector.export(
        output,
        kind=_FORMAT.value,
        opset=_OPSET.value,
        any_size=_RESIZE.value == "inside",
        runtime=_RUNTIME.value,
    )
    print(f"{output}: {parity}")
    return 0


def _serve() -> int:
    """Serves detectors, see `serve.run`; returns the exit status."""
    from fastflow_jax import serve
    from fastflow_jax.errors import InputError
    from fastflow_jax.files import expanded
    from fastflow_jax.predict import export_once

    models: dict[str, str | os.PathLike] = {}
    for text in _MODELS.value:
        name, is_given, file = text.partition("=")
        if not is_given or name in models:
            raise InputError(f"--model={text} is not a new NAME=FILE. Pass each name once.")
        models[name] = file
    if not models:
        (path,) = _needed(_WORKDIR)
        workdir = expanded(path).resolve()
        is_jax = _ENGINE.value == "jax"
        models[workdir.name] = workdir if is_jax else export_once(workdir, _WEIGHTS.value).file
    return serve.run(
        models,
        host=_HOST.value,
        port=_PORT.value,
        max_bytes=_MAX_BYTES.value,
        queue=_QUEUE.value,
        batch=_BATCH.value,
        latency_ms=_LATENCY.value,
        threads=_THREADS.value or 1,
        workers=_WORKERS.value,
        false_alarms=_FALSE_ALARMS.value,
    )


def _score_batch() -> int:
    """Scores a shard of many images, see `batch.run`; returns the exit status."""
    from fastflow_jax import batch
    from fastflow_jax.errors import InputError

    if len(_MODELS.value) > 1:
        raise InputError("The command batch has one detector. Pass --model once.")
    (model,) = _MODELS.value or _needed(_WORKDIR)
    return batch.run(
        model,
        *_needed(_INPUT, _OUTPUT),
        shard=_SHARD.value,
        column=_COLUMN.value,
        options=batch.Options(_RATE.value, _TILE.value, _RAW.value, _THREADS.value or 1),
        ray=_RAY.value,
    )


def _needed(*paths: flags.FlagHolder[str | None]) -> list[str]:
    """The values of flags; InputError if one is missing."""
    from fastflow_jax.errors import InputError

    for flag in paths:
        if flag.value is None:
            raise InputError(f"The command {_MODE.value} needs --{flag.name}. See --help.")
    return [flag.value for flag in paths if flag.value is not None]


def _run(argv: list[str]) -> int:
    """Runs `main`; errors that a user can fix end in one message and a status."""
    from fastflow_jax.errors import InputError, Interrupted
    from fastflow_jax.files import remedy

    try:
        return main(argv)
    except InputError as error:
        fail(str(error), 2)
    except Interrupted as stop:
        fail(f"{stop}. The same command continues from there.", stop.exit_code)
    except KeyboardInterrupt as stop:
        rest = " The same command continues from the last checkpoint, if any."
        if _MODE.value in ("predict", "batch"):
            rest = " The same command continues with the remaining images."
        if _INPUT.value == "-":  # other paths may be sent to it
            rest = ""
        message = f"interrupted.{rest}"
        fail(message, process.status(stop), at_once=True)  # without waiting for threads of JAX
    except Exception as error:
        if remedy(error):
            flag = _OUTPUT if _MODE.value in _WRITERS else _WORKDIR
            fail(f"{error}. {remedy(error)}, or pass another --{flag.name}.", 2)
        if _was_removed(error):
            fail(
                f"{error.filename} was removed while it was needed. Start the same command again.",
                2,
            )
        if _MODE.value in (
            "predict",
            "batch",
        ):  # Python's status 1 would mean that images are anomalous
            traceback.print_exc()
            return 2
        from fastflow_jax import parallel

        if not parallel.is_lost(error):
            raise
        reason = str(error).splitlines()[0]
        message = (
            f"another process of this run has ended, or a device has failed ({reason}). Start all "
            "processes again; they continue from the last checkpoint."
        )
        fail(message, 1, at_once=True)  # without waiting for the other process


def _was_removed(error: Exception) -> TypeGuard[FileNotFoundError]:
    """Whether an error is that of a missing file in the directory that the command writes."""
    if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, str):
        return False
    folders = _WORKDIR.value or "runs", _OUTPUT.value
    file = pathlib.Path(os.path.abspath(error.filename))
    return any(file.is_relative_to(os.path.abspath(folder)) for folder in folders if folder) or (
        _OUTPUT.value is not None and file.parent == pathlib.Path(_OUTPUT.value).absolute().parent
    )


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; for a misspelt field of the configuration, suggests similar ones."""
    from fastflow_jax.errors import InputError

    try:
        argv = commands.to_flags(argv)
        if (text := commands.help_of(argv, flags.FLAGS)) is not None:
            process.show(text)
            sys.exit(0 if argv[1:] else 2)
        argv = configs.find_all(argv)
    except InputError as error:
        fail(str(error), 2)
    words = [word for a in argv for word in a.split("=", 1)]  # --config=FILE or --config FILE
    given = [b for a, b in itertools.pairwise(words) if a in ("--config", "-config")]
    file, _, argument = given[-1].partition(":") if given else ("", "", "")
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        message = str(error)
        if error.flagname.startswith("config."):
            message = f"--{error.flagname} needs --config. Pass, for example, --config=folder."
        if error.flagname == "config.weights":
            message = "--config.weights needs --config. For predictions, pass --weights=FILE."
        fail(message, 2)
    except (flags.Error, InputError) as error:
        # An error in a configuration file comes with its traceback.
        message = str(error).rpartition(f"{InputError.__name__}: ")[2].strip()
        fail(commands.flag_problem(message), 2)
    except (AttributeError, KeyError, ValueError):  # of ml_collections
        from fastflow_jax.config import misspelt

        config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
        message = misspelt(config, argv)
        if message is None:
            raise
        fail(message, 2)


def run() -> None:
    """Runs the command of sys.argv, and ends the process with its status."""
    process.open_streams()
    handle_signals()
    try:
        app.run(_run, flags_parser=_parse)
    except KeyboardInterrupt as stop:  # during imports, before `_run` can handle it
        fail("interrupted", process.status(stop))


if __name__ == "__main__":
    run()
