"""Commands of `fastflow-jax`: each is a mode of `main.py`, with the flags that it reads."""

import contextlib
import difflib
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from fastflow_jax.cli import configs
from fastflow_jax.errors import InputError


class Command(NamedTuple):
    """One command."""

    purpose: str  # sentences; `overview` has the first one
    arguments: str  # an example
    flags: tuple[str, ...]  # names of the flags that it reads, in the order of its help


COMMON = ("threads", "quiet")  # flags of all commands
_SHARED = ("distributed", "coordinator", "processes", "process")
_STATUSES = (
    "The exit status is 0 if all images are normal, 1 if some are anomalous, 2 if the command "
    "failed, 3 if some images cannot be read, and 4 if there is no threshold."
)
COMMANDS = {
    "train": Command(
        "Trains and evaluates a configuration. The same command continues an interrupted run.",
        "--config=demo --workdir=runs/demo",
        ("config", "workdir", *_SHARED),
    ),
    "predict": Command(
        f"Scores images with the detector of a run, and draws heat maps. {_STATUSES}",
        "--workdir=runs/demo --input=photos/new --output=out",
        (
            *("workdir", "input", "output", "false_alarm_rate", "product", "roi"),
            *("tile", "every", "heatmaps"),
            *("raw", "engine", "weights"),
        ),
    ),
    "describe": Command(
        "Prints shapes, parameters, operations and memory of a model. It needs neither data nor "
        "weights.",
        "--config=mvtec:bottle",
        ("config", *_SHARED),
    ),
    "export": Command(
        "Writes the detector of a run to one file, from pixels to decisions.",
        "--workdir=runs/demo --output=detector.onnx",
        ("workdir", "output", "format", "opset", "resize", "runtime", "weights"),
    ),
    "migrate": Command(
        "Writes the detectors of a run, also of an earlier version, as saved detectors.",
        "--workdir=runs/demo --output=detector.zip",
        ("workdir", "output", "weights"),
    ),
    "serve": Command(
        "Serves the detector of a run, or exported files, over HTTP, with a web page at /.",
        "--workdir=runs/demo --port=8000",
        (
            *("workdir", "model", "host", "port", "workers", "batch", "latency_ms", "queue"),
            *("max_bytes", "false_alarms", "engine", "weights"),
        ),
    ),
    "update": Command(
        "Adds normal images to the detector of a run, without a training.",
        "--workdir=runs/demo --input=photos/new_normals",
        ("workdir", "input", "output", "undo", "keep_threshold", "finetune", "weights"),
    ),
    "audit": Command(
        "Lists normal images of a configuration that look unusual among the others.",
        "--config=folder --config.data.root=photos/screws",
        ("config", "workdir", *_SHARED),
    ),
    "data": Command(
        "Lists the data sets, or prepares and checks one. A data set is given by its name, with a "
        "category after a slash, or by --config. The exit status is 1 if its numbers of images are "
        "not the published ones.",
        "mvtec_ad/bottle --config.data.dir=DIR",
        ("config",),
    ),
    "batch": Command(
        f"Scores millions of images as a batch job. {_STATUSES}",
        "--model=detector.onnx --input=images.csv --output=out",
        (
            *("workdir", "model", "input", "output", "shard", "column", "ray"),
            *("false_alarm_rate", "tile", "raw"),
        ),
    ),
    "submit": Command(
        "Writes results of the private test images of MVTec AD 2 for its evaluation server.",
        "--workdir=runs/mvtec_ad_2 --input=DIR --output=out",
        ("workdir", "input", "output", "weights"),
    ),
}

_HELP = {"-h", "-help", "--help", "--helpshort"}
_WIDTH = 98
_NOTES = """
Results are printed to stdout; messages and progress bars go to stderr. Compiled programs are cached
in fastflow_jax/ of the user's cache directory ($XDG_CACHE_HOME or ~/.cache). At each start, the
least recently used ones are deleted until at most 1 GiB is left. To cache them in another
directory, without a bound, set JAX_COMPILATION_CACHE_DIR.
"""


def to_flags(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with a command, which is the first one, as --mode=COMMAND.

    The data set after the command `data` becomes --config=fastflow:DATA_SET.

    Raises:
      InputError: an unknown command, or a second choice of the mode or of the configuration.
    """
    program, *words = argv
    if not words or words[0].startswith("-"):
        return [program, *words]
    name, *words = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise InputError(f"There is no command {name!r}. {hint}Commands: {', '.join(COMMANDS)}.")
    _check_absent(words, "mode", name)
    added = [f"--mode={name}"]
    if name == "data" and words and not words[0].startswith("-"):
        _check_absent(words, "config", words[0])
        added.append(f"--config={configs.directory() / 'fastflow.py'}:{words.pop(0)}")
    return [program, *added, *words]


def _check_absent(words: Sequence[str], flag: str, instead: str) -> None:
    if any(word.lstrip("-").partition("=")[0] == flag for word in words if word.startswith("-")):
        raise InputError(f"--{flag} cannot be combined with {instead!r}. Leave one of them out.")


def check_flags(name: str, values: flags.FlagValues) -> None:
    """Raises InputError if a flag was given that the command does not read."""
    known = dict.fromkeys(flag for command in COMMANDS.values() for flag in command.flags)
    for flag in known:
        if values[flag].present and flag not in COMMANDS[name].flags:
            readers = [each for each, command in COMMANDS.items() if flag in command.flags]
            raise InputError(
                f"--{flag} has no effect on {name}. Leave it out; it is for {', '.join(readers)}."
            )


_NO_NUMBER = re.compile(
    r"flag (--[\w.]+)=(.*): (could not convert string to float|invalid literal)"
)


def flag_problem(message: str) -> str:
    """Returns a message of absl on a flag, where its value is no number, as "problem. remedy."."""
    if (found := _NO_NUMBER.match(message)) is None:
        return message
    flag, value, reason = found.groups()
    if reason == "invalid literal":
        return f"{flag} must be a whole number, not {value!r}."
    percent = re.fullmatch(r"([\d.]+) ?%", value)
    with contextlib.suppress(ValueError):
        if percent is not None:
            return f"{flag} must be a share, not {value!r}. Write {float(percent[1]) / 100:g}."
    return f"{flag} must be a number, not {value!r}."


def help_of(argv: Sequence[str], values: flags.FlagValues) -> str | None:
    """Returns the help that the arguments of `to_flags` ask for, or None if they do not.

    Args:
      argv: without arguments, or with --help: of the command, if there is one.
      values: all flags.
    """
    program, *words = argv
    title = pathlib.Path(program).name
    title = "python -m fastflow_jax.main" if title == "main.py" else title
    if words and not _HELP.intersection(words):
        return None
    modes = [word.partition("=")[2] for word in words if word.startswith("--mode=")]
    if modes and modes[-1] in COMMANDS:
        return _command_help(title, modes[-1], values)
    return overview(title)


def overview(program: str) -> str:
    """Returns the list of commands."""
    lines = [f"Usage: {program} COMMAND [--FLAG=VALUE ...]", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:10}{command.purpose.partition('. ')[0].rstrip('.')}.")
    lines += ["", f"{program} COMMAND --help lists the flags of a command.", _NOTES.rstrip()]
    return "\n".join(lines)


def _command_help(program: str, name: str, values: flags.FlagValues) -> str:
    command = COMMANDS[name]
    lines = [f"Usage: {program} {name} [--FLAG=VALUE ...]", ""]
    lines += [*textwrap.wrap(command.purpose, _WIDTH), ""]
    lines += [f"Example: {program} {name} {command.arguments}", ""]
    for flag in (*command.flags, *COMMON):
        lines += _flag_help(values[flag], name)
        if flag == "config":
            lines += ["  --config.FIELD=VALUE", "      Set this field of the configuration."]
    if "config" in command.flags:
        listed = f"Packaged configurations: {', '.join(configs.names())}."
        lines += ["", *textwrap.wrap(listed, _WIDTH)]
    return "\n".join(lines)


_MODES = r"(?:\w+, )*\w+(?: or \w+)?"
_CLAUSE = re.compile(rf"[Ww]ith --mode=({_MODES}), ")


def clauses(help_text: str) -> list[tuple[frozenset[str], str]]:
    """Splits the help of a flag into the commands that a clause is for, none for all, and its text.

    "With --mode=predict or batch, a; with --mode=export, b." is for predict and batch: a, and for
    export: b.
    """
    found = []
    for clause in re.split(rf"; (?=with --mode={_MODES}, )", help_text.rstrip(".")):
        begin = _CLAUSE.match(clause)
        commands = re.split(", | or ", begin[1]) if begin else ()
        found.append((frozenset(commands), clause[begin.end() if begin else 0 :]))
    return found


def _flag_help(flag: Any, command: str) -> list[str]:
    """Lines of the help of a flag, as far as it concerns a command."""
    choices = getattr(flag.parser, "enum_values", None)
    _, _, text = flag.help.rpartition(">: ")  # after the choices
    text = text.partition(";\n    repeat")[0]
    parts = [part for commands, part in clauses(text) if not commands or command in commands]
    text = "; ".join(parts)
    default = "" if flag.boolean or not flag.default else f" Default: {flag.default}."
    value = "|".join(choices or ["VALUE"])
    head = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={value}"
    text = f"{text[:1].upper()}{text[1:]}.{default}"
    return [f"  {head}", *(f"      {line}" for line in textwrap.wrap(text, _WIDTH - 6))]
