"""Commands of `fastflow-jax`: the same code as the modes of `main.py`, and their help."""

import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest
from absl import flags

from fastflow_jax import main
from fastflow_jax.cli import commands

# Of ml_collections.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parents[2]
NAMES = tuple(commands.COMMANDS)


def flags_of_main():
    return flags.FLAGS.flags_by_module_dict()[main.__name__]


def shown(text):
    """Names of the flags that a help lists."""
    return set(re.findall(r"^  --(?:\[no\])?([a-z_]+)(?:=|$)", text, re.M))


def test_commands_are_the_modes():
    (mode,) = (flag for flag in flags_of_main() if flag.name == "mode")
    assert tuple(mode.parser.enum_values) == NAMES


def test_each_flag_belongs_to_a_command():
    of_commands = {flag for command in commands.COMMANDS.values() for flag in command.flags}
    assert of_commands | {*commands.COMMON, "mode"} == {flag.name for flag in flags_of_main()}


def test_help_of_a_flag_names_the_commands_that_read_it():
    for flag in flags_of_main():
        named = {
            name for names, _ in commands.clauses(flag.help.rpartition(">: ")[2]) for name in names
        }
        if named:
            readers = {n for n, command in commands.COMMANDS.items() if flag.name in command.flags}
            assert named == readers, flag.name


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_only_the_flags_of_the_command(name, started, capsys):
    assert started([name, "--help"]) == 0
    help_of_command = capsys.readouterr().out
    command = commands.COMMANDS[name]
    expected = {*command.flags, *commands.COMMON}
    assert shown(help_of_command) == expected
    assert max(map(len, help_of_command.splitlines())) <= 100
    assert started([f"--mode={name}", "-h"]) == 0
    assert capsys.readouterr().out == help_of_command


def test_help_of_a_flag_is_that_for_the_command(started, capsys):
    started(["export", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--output=VALUE Write this file. --format" in text
    assert "--opset=VALUE The opset of an ONNX file. Default: 18." in text


def test_help_without_a_command_lists_all_of_them(started, capsys):
    assert started(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  (\w+) ", text, re.M) == list(NAMES)
    assert started([]) == 2
    assert capsys.readouterr().out == text


def test_a_command_is_the_same_as_its_mode(started, capsys):
    settings = ["--config=folder", "--config.backbone=pixels", "--config.image_size=16"]
    assert started(["describe", *settings]) == 0
    as_command = capsys.readouterr().out
    assert started(["--mode=describe", *settings]) == 0
    assert capsys.readouterr().out == as_command
    assert "trainable parameters" in as_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "There is no command 'trian'. Did you mean train? Commands: train, predict"),
        (["xyz"], "There is no command 'xyz'. Commands: train"),
        (["predict", "--workdri=x"], "'workdri'. Did you mean: workdir"),
        (["train", "--mode=predict"], "--mode cannot be combined with 'train'"),
        (["data", "btad", "--config=folder"], "--config cannot be combined with 'btad'"),
        (["train", "again"], "The argument 'again' is unknown"),
        (
            ["predict", "--port=80"],
            "--port has no effect on predict. Leave it out; it is for serve",
        ),
        (["--mode=describe", "--config=folder", "--notile"], "--tile has no effect on describe"),
        (
            ["predict", "--false_alarm_rate=5%"],
            "--false_alarm_rate must be a share, not '5%'. Write 0.05.",
        ),
        (["predict", "--false_alarm_rate=1.2.3%"], "must be a number, not '1.2.3%'."),
        (["serve", "--port=http"], "--port must be a whole number, not 'http'."),
        (
            ["train", "--config=folder", "--config.data.holdout=10 %"],
            "--config.data.holdout must be a share, not '10 %'. Write 0.1.",
        ),
        (["data", "--config.data.dir=x"], "--config.data.dir needs --config"),
        (["data", "mvtec_add"], "data.name is 'mvtec_add'. Choose one of"),
    ],
)
def test_wrong_arguments_end_in_one_message(arguments, message, started, capsys):
    assert started(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_help_starts_neither_jax_nor_tfds(environment):
    code = """
import sys
from fastflow_jax import main
sys.argv = ["fastflow-jax", "serve", "--help"]
try:
    main.run()
finally:
    print(sorted({"jax", "numpy", "tensorflow_datasets"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: fastflow-jax serve [--FLAG=VALUE ...]")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["data"]])
def test_a_text_may_be_read_in_part(arguments, environment):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastflow_jax.main", *arguments]
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_console_script_runs_main():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pkgutil.resolve_name(project["scripts"]["fastflow-jax"]) is main.run
