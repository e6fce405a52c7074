"""ELPV, on a miniature package: split, atomic preparation and error messages."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fastflow_jax.data import open_dataset
from fastflow_jax.data.tfds.elpv import Elpv
from fastflow_jax.errors import InputError

PROBABILITIES = (0, 0.3333333333333333, 0.6666666666666666, 1)


@pytest.fixture
def package(tmp_path, write_image, monkeypatch):
    """Miniature of `elpv-dataset` that replaces the real one; cell i has grey level i."""
    folder = tmp_path / "site-packages"
    data = folder / "elpv_dataset/data"
    info = folder / "elpv_dataset-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elpv-dataset\nVersion: 9.9\n")
    lines = []
    for i in range(80):
        path = f"images/cell{i:04}.png"
        write_image(data / path, i)
        lines.append(f"{path}  {PROBABILITIES[i // 2 % 4]}  {'mono' if i % 2 else 'poly'}\n")
    (data / "labels.csv").write_text("".join(lines))
    monkeypatch.syspath_prepend(folder)
    return data


@pytest.fixture
def open_elpv(data_config, tmp_path):
    return lambda **fields: open_dataset(
        data_config("elpv", **({"category": "mono", "dir": str(tmp_path / "prepared")} | fields))
    )


def test_the_split(package, open_elpv):
    dataset = open_elpv()
    good = [i for i in range(80) if i % 2 == 1 and i // 2 % 4 == 0]
    defective = [i for i in range(80) if i % 2 == 1 and i // 2 % 4 == 3]
    train, test = good[:4] + good[5:9], [good[4], good[9]]  # every fifth good cell is a test image
    assert dataset.name == "elpv"
    assert dataset.train.names == tuple(f"good/cell{i:04}.png" for i in train)
    assert dataset.train.labels.tolist() == [0] * 8
    assert dataset.test.names == (
        *(f"good/cell{i:04}.png" for i in test),
        *(f"defective/cell{i:04}.png" for i in defective),
    )
    assert dataset.test.labels.tolist() == [0] * 2 + [1] * 10
    for source, cells in ((dataset.train, train), (dataset.test, test + defective)):
        examples = list(source)
        assert [int(example.image[0, 0, 0]) for example in examples] == cells
        assert {example.image.shape for example in examples} == {(6, 8, 3)}
        assert {example.mask for example in examples} == {None}


def test_provenance(package, open_elpv, tmp_path):
    provenance = open_elpv(category="poly").provenance
    assert provenance["source"] == "elpv-dataset 9.9"
    assert provenance["licence"] == "CC BY-NC-SA 4.0"
    assert provenance["category"] == "poly"
    assert provenance["prepared"] == str(tmp_path / "prepared/elpv/poly/1.0.0")
    assert (provenance["train_images"], provenance["test_images"]) == (8, 12)


def test_data_are_prepared_once(package, open_elpv):
    first = open_elpv()
    for path in package.glob("images/*"):
        path.unlink()
    again = open_elpv()
    assert again.test.names == first.test.names
    np.testing.assert_array_equal(again.test[3].image, first.test[3].image)


def test_preparing_prints_nothing(package, open_elpv, capsys):
    open_elpv()
    assert capsys.readouterr() == ("", "")


def test_the_directory_comes_from_the_environment(package, open_elpv, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    assert open_elpv(dir=None).provenance["prepared"].startswith(str(tmp_path / "elsewhere"))
    assert open_elpv().provenance["prepared"].startswith(str(tmp_path / "prepared"))


def test_raw_data_from_a_directory(package, open_elpv, tmp_path):
    moved = package.rename(tmp_path / "raw")
    assert open_elpv(root=str(moved)).provenance["source"] == str(moved)
    assert len(open_elpv(root=str(moved)).train) == 8
    with pytest.raises(InputError, match=rf"was prepared from {re.escape(str(moved))}, not from"):
        open_elpv(root=str(tmp_path / "other"))


def test_tfds_reads_the_prepared_data(package, open_elpv, tmp_path):
    open_elpv()
    source = tfds.data_source(
        "elpv/mono",
        split="test",
        data_dir=tmp_path / "prepared",
        builder_kwargs={"file_format": "array_record"},
        decoders={"image": tfds.decode.SkipDecoding()},
        download=False,
    )
    assert len(source) == 12
    assert source[2]["label"] == 1
    assert source[2]["defect"] == b"defective"
    assert source[2]["image"] == (package / "images/cell0007.png").read_bytes()


def test_missing_package(open_elpv, monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(InputError, match=r"pip install elpv-dataset \(91 MB"):
        open_elpv()


@pytest.mark.parametrize(("category", "says"), [("mona", "is 'mona'"), (None, "is not set")])
def test_an_unknown_type(open_elpv, category, says):
    with pytest.raises(InputError, match=rf"^data\.category {says}\. Choose one of mono, poly\.$"):
        open_elpv(category=category)


def test_a_root_without_the_list(open_elpv, tmp_path):
    with pytest.raises(InputError, match=r"^data\.root .* has no labels\.csv"):
        open_elpv(root=str(tmp_path))


def truncated_image(package):
    path = package / "images/cell0007.png"
    path.write_bytes(path.read_bytes()[:-20])
    return rf"{path} is broken"


def missing_image(package):
    path = package / "images/cell0007.png"
    path.unlink()
    return rf"{path} cannot be read: No such file"


def missing_list(package):
    (package / "labels.csv").unlink()
    return r"labels\.csv cannot be read .*\. Run pip install --force-reinstall elpv-dataset"


def damaged_list(package):
    path = package / "labels.csv"
    path.write_text(path.read_text() + "images/cell")
    return r"labels\.csv is damaged in line 81\. Run pip install --force-reinstall elpv-dataset"


def short_list(package):
    path = package / "labels.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    return r"labels\.csv lists too few mono cells\. Run pip install --force-reinstall elpv-dataset"


@pytest.mark.parametrize(
    "spoil", [truncated_image, missing_image, missing_list, damaged_list, short_list]
)
def test_a_damaged_package_leaves_nothing_prepared(package, open_elpv, tmp_path, spoil):
    content = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=spoil(package)):
        open_elpv()
    assert not list((tmp_path / "prepared").rglob("*.array_record*"))
    for path, data in content.items():
        path.write_bytes(data)
    assert len(open_elpv().train) == 8


def test_a_full_disk(package, open_elpv, monkeypatch, tmp_path):
    # Error of array_record on a full disk.
    def write(self, path, examples):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr("tensorflow_datasets.core.writer.ExampleWriter.write", write)
    with pytest.raises(InputError, match=r"elpv/mono/1\.0\.0 cannot be written to .*No space left"):
        open_elpv()


def test_a_directory_that_cannot_be_written(package, open_elpv, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*set data\.dir to another"):
        open_elpv(dir=str(tmp_path / "file"))


@pytest.mark.parametrize("kind", ["dataset_info.json", "array_record"])
def test_a_damaged_preparation_is_named(package, open_elpv, tmp_path, kind):
    prepared = Path(open_elpv().provenance["prepared"])
    for path in prepared.glob(f"*{kind}*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"in {prepared.parent}.* is damaged .*Remove it"):
        open_elpv()


def test_a_killed_preparation_is_restarted(package, open_elpv, tmp_path):
    # Another process is killed after it has prepared some images.
    program = f"""
        import sys, time
        sys.path.insert(0, {str(package.parents[1])!r})
        from ml_collections import ConfigDict
        from fastflow_jax.data import open_dataset
        from fastflow_jax.data.tfds import prepared

        check_image = prepared.check_image
        def slow(image, name):
            check_image(image, name)
            if "cell0073" in name:
                print("now", file=sys.__stdout__, flush=True)
                time.sleep(60)
        prepared.check_image = slow
        open_dataset(ConfigDict(dict(
            name="elpv", category="mono", root=None, dir={str(tmp_path / "prepared")!r})))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "now\n"
        os.kill(process.pid, signal.SIGKILL)
    folder = tmp_path / "prepared/elpv/mono"
    assert [path.name.split(".")[0] for path in folder.iterdir()] == ["incomplete"]
    assert len(open_elpv().train) == 8
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]


def test_preparation_by_another_process(package, open_elpv, monkeypatch):
    split_generators = Elpv._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(Elpv, "_split_generators", split_generators)
        open_elpv()
        return split_generators(self, dl_manager)

    monkeypatch.setattr(Elpv, "_split_generators", overtaken)
    assert len(open_elpv().train) == 8


def test_the_real_package(data_config, tmp_path):
    try:
        importlib.metadata.distribution("elpv-dataset")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install elpv-dataset")
    start = time.perf_counter()
    for cell_type, good, defective in (("mono", 588, 313), ("poly", 920, 402)):
        dataset = open_dataset(data_config("elpv", category=cell_type, dir=str(tmp_path)))
        assert len(dataset.train) == good - good // 5
        assert len(dataset.test) == good // 5 + defective
        assert dataset.test.labels.sum() == defective
        assert dataset.test[0].image.shape == (300, 300, 3)
        assert not set(dataset.train.names) & set(dataset.test.names)
    assert time.perf_counter() - start < 30
