"""The catalogue of data sets, and their preparation from the command line."""

import re
import runpy

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import data
from fastflow_jax.cli import configs
from fastflow_jax.data import catalogue
from fastflow_jax.data.tfds import mpdd

# Of ml_collections.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

MADE = {"train/good": 5, "test/good": 3, "test/hole": 2}  # images of a category of MPDD


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data directory with the files of a category of MPDD, to be found without --config."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(mpdd.COUNTS, "tubes", (5, 5))
    root = tmp_path / "downloads/manual/mpdd/tubes"
    rng = np.random.default_rng(0)
    for name, n in MADE.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            image = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(image).save(root / name / f"{i:03}.png")
    (root / "ground_truth/hole").mkdir(parents=True)
    for i in range(2):
        mask = np.zeros((16, 16), np.uint8)
        mask[4:9] = 255
        Image.fromarray(mask).save(root / f"ground_truth/hole/{i:03}_mask.png")
    return tmp_path


def entry(name):
    return next(each for each in catalogue.entries() if each.name == name)


def test_all_data_sets_are_listed(started, capsys):
    assert started(["data"]) == 0
    table = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == [n for n in data.DATASETS if n != "folder"]


def test_published_numbers_are_those_of_the_publications():
    # Section 3 of the paper on MVTec AD; the README of VisA; section 3 of the paper on MPDD.
    assert (entry("mvtec_ad").categories, entry("mvtec_ad").images) == (15, "3,629 + 1,725")
    assert (entry("visa").categories, entry("visa").images) == (12, "8,659 + 2,162")
    assert (entry("mpdd").categories, entry("mpdd").images) == (6, "888 + 458")
    assert entry("cifar10").images == "50,000 + 10,000"
    assert (entry("mvtec_ad").size, entry("mvtec_ad").licence) == ("5.3 GB", "CC BY-NC-SA 4.0")


def test_the_numbers_of_the_synthetic_set_are_right():
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    config = runpy.run_path(str(configs.directory() / "synthetic.py"))["get_config"](None).data
    opened = [data.opener(config)(category) for category in data.categories(config)]
    numbers = [sum(len(d.train) for d in opened), sum(len(d.test) for d in opened)]
    assert entry("synthetic").images == " + ".join(map(str, numbers))


def test_a_category_is_prepared_and_counted(folder, started, capsys):
    assert entry("mpdd").state == "no"
    assert started(["data", "mpdd/tubes"]) == 0
    out, err = capsys.readouterr()
    head, row = out.splitlines()
    assert "10% of the training images are held out" in err
    assert re.split("  +", head) == [
        "category",
        "training",
        "calibration",
        "test: normal",
        "defective",
    ]
    assert row.split() == ["tubes", "5", "-", "3", "2"]
    assert entry("mpdd").state == "1 of 6"
    assert (folder / "mpdd/tubes").is_dir()


def test_other_numbers_than_published_are_reported(folder, started, capsys, monkeypatch):
    monkeypatch.setitem(mpdd.COUNTS, "tubes", (122, 101))
    assert started(["data", "mpdd/tubes"]) == 1
    out, err = capsys.readouterr()
    assert "tubes" in out
    assert "has 5 training and 5 test images, but officially 122 and 101" in err


def test_missing_files_are_requested(folder, started, capsys):
    assert started(["data", "mpdd/connector"]) == 2
    err = capsys.readouterr().err
    assert f"mpdd (connector) is not in {folder}/downloads/manual/mpdd. Download" in err


def test_images_of_a_directory_are_counted(folder, started, capsys):
    root = folder / "downloads/manual/mpdd/tubes"
    assert started(["data", "--config=folder", f"--config.data.root={root}"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["all", "5", "-", "3", "2"]
    assert "Only 5 normal images: the detector is k-NN" in err
    assert "are held out" not in err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("window=(5,)", r"config.data.window must be \(low, high\), such as \(1,99\), not \(5,\)"),
        ("window=(1,200)", r"config.data.window must be \(low, high\)"),
        ("bits=99", "config.data.bits must be from 9 to 16, not 99"),
    ],
)
def test_levels_that_do_not_fit_end_in_one_message(folder, started, capsys, field, message):
    root = folder / "downloads/manual/mpdd/tubes"
    words = ["data", "--config=folder", f"--config.data.root={root}", f"--config.data.{field}"]
    assert started(words) == 2
    assert re.search(f"error: {message}", capsys.readouterr().err)
