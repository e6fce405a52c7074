"""Saved detectors: format 1 and its goldens, damaged and hostile files, writing at once."""

import errno
import hashlib
import io
import json
import os
import pathlib
import platform
import shutil
import stat
import struct
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import fastflow_jax
from fastflow_jax import Detector
from fastflow_jax.errors import InputError
from fastflow_jax.predict import predict

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SAVED = GOLDENS / "durable"
SCORES = json.loads((GOLDENS / "durable_scores.json").read_text())


def members(path):
    """Contents of a saved detector by file name."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def updated(config, changes):
    """A configuration with the changed fields."""
    nested = {
        name: updated(config[name], value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return config | nested


def check_scores(name):
    """Raises an error unless a golden detector has its scores, to 1e-4, and its decisions."""
    images = np.random.default_rng(1).integers(118, 138, (2, 20, 30, 3), np.uint8)
    images[1, 6:16, 12:24] = (250, 20, 20)
    results = Detector.load(SAVED / name).predict(list(images))
    for result, known in zip(results, SCORES[name], strict=True):
        assert result.score == pytest.approx(known["score"], rel=1e-4)
        assert result.anomaly_map.mean() == pytest.approx(known["map_mean"], rel=1e-4, abs=1e-3)
        assert result.distance == pytest.approx(known["distance"], rel=1e-3)
        assert (result.p_value, result.is_anomalous) == (known["p_value"], known["is_anomalous"])


@pytest.mark.parametrize("name", SCORES)
def test_format_1_loads_with_equal_scores(name):
    check_scores(name)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 processors")
def test_scores_do_not_depend_on_the_instruction_set():
    code = "import test_durable as t\nfor name in t.SCORES: t.check_scores(name)\nprint('equal')"
    flags = "--xla_cpu_max_isa=AVX2"  # instead of AVX-512, where the processor has it
    paths = [str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("new", ["saved", "saved.zip"])
def test_a_loaded_detector_is_saved_with_equal_bytes(name, new, tmp_path):
    before = members(SAVED / name)
    after = members(Detector.load(SAVED / name).save(tmp_path / new))
    assert after == before | {"detector.json": after["detector.json"]}
    old, written = (json.loads(files["detector.json"]) for files in (before, after))
    known, now = old.pop("config"), written.pop("config")
    assert written.pop("packages")["jax"] == jax.__version__
    assert written.pop("licence") == ("unknown" if name == "fastflow" else "none needed")
    assert written == old | {"version": fastflow_jax.__version__}
    assert updated(now, known) == now  # later versions may add fields
    again = Detector.load(tmp_path / new).save(tmp_path / f"again_{new}")
    assert members(again) == after


def test_a_saved_detector_consists_of_json_and_safetensors():
    files = members(SAVED / "fastflow")
    about = json.loads(files.pop("detector.json"))
    assert about["format"] == 1
    for name, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        assert about["files"].pop(name) == {"bytes": len(data), "sha256": digest}
    assert about["files"] == {}
    state = safetensors.numpy.load(files["scorer.safetensors"])
    assert state["bank/features_0"].dtype == np.float16
    assert state["calibration/scale_mean"].shape == (3,)
    assert not [name for name in state if "optimizer" in name]
    spade = io.BytesIO(members(SAVED / "spade.zip")["scorer.safetensors"])
    (length,) = struct.unpack("<Q", spade.read(8))
    assert json.loads(spade.read(length))["maps_0"]["dtype"] == "BF16"


@pytest.mark.parametrize(
    ("kind", "name"), [("fastflow", "fastflow"), ("knn.zip", "knn.zip"), ("knn.zip", "renamed.bin")]
)
def test_save_without_a_path_changes_the_thresholds_alone(kind, name, tmp_path):
    copy = shutil.copytree if (SAVED / kind).is_dir() else shutil.copy
    path = pathlib.Path(copy(SAVED / kind, tmp_path / name))
    before = members(path)
    assert Detector.load(path).with_threshold(12.5, pixel=3.0).save() == path
    assert Detector.load(path).image_threshold.value == 12.5
    after, changed = members(path), json.loads(before["detector.json"])
    assert after == before | {"detector.json": after["detector.json"]}
    changed["thresholds"] = json.loads(after["detector.json"])["thresholds"]
    assert json.loads(after["detector.json"]) == changed
    assert changed["thresholds"]["pixel"]["value"] == 3.0
    assert os.listdir(tmp_path) == [name]
    Detector.load(path).with_threshold(1.5).save(path)
    assert Detector.load(path).image_threshold.value == 1.5


def test_predict_takes_a_zip_file(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((20, 30, 3), 128, np.uint8)).save(path)
    assert predict(SAVED / "knn.zip", str(path), tmp_path / "out", heatmaps=False) in (0, 1)
    line = json.loads((tmp_path / "out/predictions.jsonl").read_text())
    assert line["score"] == Detector.load(SAVED / "knn.zip").predict(path).score


@pytest.mark.parametrize("name", ["new", "below/new", "new.zip", "NEW.ZIP"])
def test_nothing_is_left_if_the_disk_is_full(name, tmp_path, monkeypatch):
    detector = Detector.load(SAVED / "knn.zip")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(InputError, match=r"No space left.*\. Make room there, or pass another"):
            detector.save(tmp_path / name)
    assert not [path for path in tmp_path.rglob("*") if path != tmp_path / "below"]
    assert Detector.load(detector.save(tmp_path / name)).config == detector.config


def test_other_content_is_not_replaced(tmp_path):
    detector = Detector.load(SAVED / "knn.zip")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.zip").mkdir()
    for file in ("folder/notes.txt", "file", "file.zip"):
        (tmp_path / file).write_text("mine")
    for path, message in (
        ("folder", "has other files"),
        ("file", r"exists\. Save to a new"),
        ("file.zip", r"exists\. Save to a new"),
        ("folder.zip", r"exists\. Save to a new"),
        ("file/below", "a file of that name exists"),
    ):
        with pytest.raises(InputError, match=message):
            detector.save(tmp_path / path)
    assert (tmp_path / "file.zip").read_text() == "mine"
    assert Detector.load(detector.save(tmp_path / "empty")).config == detector.config


def with_json(change):
    """A change of the files of a saved detector by a change of detector.json."""

    def apply(files):
        about = json.loads(files["detector.json"])
        change(about)
        return files | {"detector.json": json.dumps(about).encode()}

    return apply


def replaced(name, change):
    """A change of one file, with its size and sha256 recorded again."""

    def apply(files):
        data = change(files[name])
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return with_json(lambda about: about["files"].update({name: entry}))(files | {name: data})

    return apply


def arrays(change):
    """A change of the arrays of the scorer."""

    def apply(data):
        state = safetensors.numpy.load(data)
        change(state)
        return safetensors.numpy.save(state)

    return replaced("scorer.safetensors", apply)


DAMAGES = {
    "a flipped bit": (
        lambda files: files | {"scorer.safetensors": files["scorer.safetensors"][:-1] + b"\7"},
        r"is damaged \(the sha256 of scorer\.safetensors is not the recorded one\)\. Restore",
    ),
    "a truncated file": (
        lambda files: files | {"shift.safetensors": files["shift.safetensors"][:-4]},
        r"shift\.safetensors has \d+ bytes instead of",
    ),
    "a longer file": (
        lambda files: files | {"shift.safetensors": files["shift.safetensors"] + b"12"},
        r"shift\.safetensors has \d+ bytes, more than",
    ),
    "a missing file": (
        lambda files: {n: x for n, x in files.items() if n != "held_out.safetensors"},
        r"held_out\.safetensors is missing",
    ),
    "no scorer": (
        with_json(lambda a: a["files"].pop("scorer.safetensors")),
        r"scorer\.safetensors",
    ),
    "a later format": (with_json(lambda a: a.update(format=2)), "format 2, and this .*Install"),
    "a format that is none": (with_json(lambda a: a.update(format=True)), "the format True, and"),
    "no format": (with_json(lambda a: a.pop("format")), "."),
    "an unknown key": (with_json(lambda a: a.update(more=1)), "the key 'more' of .* unknown"),
    "a missing key": (
        with_json(lambda a: a.pop("weights")),
        "the key 'weights' of .* is missing",
    ),
    "an unknown file": (
        with_json(lambda a: a["files"].update({"../x": {}})),
        r"the file '\.\./x' in .* is unknown",
    ),
    "an unknown property of a file": (
        with_json(lambda a: a["files"]["shift.safetensors"].update(url="x")),
        r"the bytes and the sha256 of shift\.safetensors",
    ),
    "an absurd size": (
        with_json(lambda a: a["files"]["shift.safetensors"].update(bytes=10**18)),
        "instead of 1000000000000000000",
    ),
    "an unknown field": (with_json(lambda a: a["config"].update(depth=1)), "no field 'depth'"),
    "a field of another type": (
        with_json(lambda a: a["config"].update(batch_size="many")),
        "configuration is damaged",
    ),
    "a value out of bounds": (
        with_json(lambda a: a["config"]["map"].update(sigma=-1.0)),
        r"config\.map\.sigma must be from 0",
    ),
    "an empty field": (
        with_json(lambda a: a["config"].update(image_size=None)),
        r"config\.image_size is not set",
    ),
    "an unknown threshold": (
        with_json(lambda a: a["thresholds"].update(object=None)),
        "must have the thresholds",
    ),
    "a threshold without a value": (
        with_json(lambda a: a["thresholds"]["image"].update(value=float("nan"))),
        "A threshold is damaged",
    ),
    "another profile": (
        with_json(lambda a: a["images"].update(height=[1])),
        "record of the training images is damaged",
    ),
    "no dictionary": (lambda files: files | {"detector.json": b"[1]"}, "."),
    "a deep list": (lambda files: files | {"detector.json": b"[" * 10**5}, "is damaged"),
    "a long description": (
        lambda files: files | {"detector.json": files["detector.json"] + b" " * 2**20},
        r"detector\.json has \d+ bytes, more than",
    ),
    "no safetensors": (replaced("scorer.safetensors", lambda data: b"\xff" * 99), "is damaged"),
    "a missing array": (arrays(lambda s: s.pop("bank_0")), "bank_0 is missing"),
    "an unknown array": (
        arrays(lambda s: s.update({"bank_7\n": s["bank_0"]})),
        r"'bank_7\\n' is unknown",
    ),
    "an array of another shape": (
        arrays(lambda s: s.update(bank_0=s["bank_0"][:, :2])),
        r"bank_0 has the shape \(\d+, 2\), not \(any, 3\)",
    ),
    "an empty bank": (arrays(lambda s: s.update(bank_0=s["bank_0"][:0])), r"shape \(0, 3\)"),
    "an array of another type": (
        arrays(lambda s: s.update(mean_0=s["mean_0"].astype(int))),
        "mean_0 has the type int64, not floating",
    ),
    "other held-out scores": (
        replaced("held_out.safetensors", lambda d: safetensors.numpy.save({"scores": np.ones(3)})),
        "tails is missing",
    ),
    "another reference": (
        replaced("shift.safetensors", lambda d: safetensors.numpy.save({"rows": np.ones((3, 1))})),
        "center is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("kind", ["directory", "stored", "deflated"])
def test_a_damaged_detector_is_refused_with_one_message(name, kind, tmp_path):
    change, message = DAMAGES[name]
    files = change(members(SAVED / "knn.zip"))
    path = tmp_path / ("saved" if kind == "directory" else "saved.zip")
    if kind == "directory":
        path.mkdir()
        for file, data in files.items():
            (path / file).write_bytes(data)
    else:
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            for file, data in files.items():
                archive.writestr(file, data)
    with pytest.raises(InputError, match=message) as error:
        Detector.load(path)
    assert len(str(error.value)) < 400


def as_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for info, data in files:
            archive.writestr(info, data)
    return path


def info(name, **fields):
    made = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((info("../outside"), b""), r"'\.\./outside' is not a file of a saved detector"),
        ((info("/etc/outside"), b""), "'/etc/outside' is not a file"),
        ((info("knn/detector.json"), b"{}"), "'knn/detector.json' is not a file"),
        ((info("variables.npz"), b""), r"'variables\.npz' is not a file"),
        (
            (info("shift.safetensors", external_attr=(stat.S_IFLNK | 0o777) << 16), b"/etc/passwd"),
            r"'shift\.safetensors' is not a file",
        ),
        ((info("scorer.safetensors"), b""), "several files of one name"),
        (
            (info("backbone.safetensors", compress_type=zipfile.ZIP_DEFLATED), bytes(10**8)),
            r"its files claim 1000\d+ bytes",
        ),
        ((info("backbone.safetensors", compress_type=zipfile.ZIP_LZMA), b"1"), "another method"),
    ],
)
def test_a_hostile_zip_file_is_refused_and_nothing_is_unpacked(
    extra, message, tmp_path, monkeypatch
):
    files = members(SAVED / "knn.zip")
    files.pop("shift.safetensors") if extra[0].filename == "shift.safetensors" else None
    path = as_zip(tmp_path / "saved.zip", [*files.items(), extra])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=message):
        Detector.load(path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["here", "saved.zip"]


def test_a_zip_file_may_be_compressed(tmp_path):
    files = members(SAVED / "knn.zip").items()
    path = as_zip(tmp_path / "saved.zip", files, compression=zipfile.ZIP_DEFLATED)
    assert Detector.load(path).config == Detector.load(SAVED / "knn.zip").config


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_zip_file_is_refused(part, tmp_path):
    data = (SAVED / "knn.zip").read_bytes()
    (tmp_path / "saved.zip").write_bytes(data[: int(part * len(data))])
    with pytest.raises(InputError, match=r"is not a saved detector, or it is incomplete\. Pass"):
        Detector.load(tmp_path / "saved.zip")


def test_every_changed_byte_of_a_zip_file_is_noticed_or_harmless(tmp_path):
    """Names, dates and sizes of a .zip file are stored twice; one of them may not matter."""
    data = (SAVED / "subspace.zip").read_bytes()
    expected = Detector.load(SAVED / "subspace.zip").scorer.state_dict()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(data), 150):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.integers(8)
        (tmp_path / "saved.zip").write_bytes(changed)
        try:
            loaded = Detector.load(tmp_path / "saved.zip")
        except InputError:
            refused += 1
        else:
            for name, x in loaded.scorer.state_dict().items():
                np.testing.assert_array_equal(x, expected[name])
    assert refused > 75
