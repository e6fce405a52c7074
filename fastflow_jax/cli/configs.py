"""Packaged configurations by name: `--config=mvtec:bottle` is `configs/mvtec.py:bottle`."""

import difflib
import pathlib
from collections.abc import Sequence

import fastflow_jax
from fastflow_jax.errors import InputError


def directory() -> pathlib.Path:
    """Returns the directory of the packaged configurations: of a wheel, or of the checkout."""
    package = pathlib.Path(fastflow_jax.__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Returns the names of the packaged configurations in alphabetical order."""
    return sorted(file.stem for file in directory().glob("*.py"))


def find(value: str) -> str:
    """Returns a value of --config, with the file of the configuration if it is given by name.

    Args:
      value: a file, or the name of a packaged configuration, and an argument after a colon if it
        takes one. A file in the working directory takes precedence over a name.

    Raises:
      InputError: there is no such file and no such name.
    """
    file, colon, argument = value.partition(":")
    if pathlib.Path(file).is_file():
        return value
    if file in (known := names()):
        return f"{directory() / file}.py{colon}{argument}"
    near = difflib.get_close_matches(pathlib.Path(file).stem, known, n=1)
    hint = f"Did you mean --config={near[0]}{colon}{argument}? " if near else ""
    raise InputError(
        f"The configuration {file} was not found in {pathlib.Path.cwd()}. {hint}Pass an existing "
        f"file, or the name of a packaged configuration: {', '.join(known)}."
    )


def find_all(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with `find` applied to each --config=VALUE and --config VALUE."""
    words, is_value = [], False
    for word in argv:
        flag, is_given, value = word.partition("=")
        is_config = flag in ("--config", "-config")
        if is_config and is_given:
            word = f"{flag}={find(value)}"
        words.append(find(word) if is_value else word)
        is_value = is_config and not is_given
    return words
