"""Audits of the normal images of a data set, from the command line and in runs."""

import json

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.config import default, fill, name_data
from fastflow_jax.errors import InputError
from fastflow_jax.runs import audit, experiment

TINY = [
    "--config.weights=random",
    "--config.image_size=(32,)",
    "--config.layers=('blocks.2',)",
    "--config.batch_size=4",
]


@pytest.fixture
def photos(tmp_path):
    """Twelve grey images with noise; 7.png has a bright square."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos/train/good"
    folder.mkdir(parents=True)
    for i in range(12):
        image = rng.integers(100, 120, (32, 32, 3), np.uint8)
        if i == 7:
            image[8:20, 8:20] = 255
        Image.fromarray(image).save(folder / f"{i}.png")
    return tmp_path / "photos"


def tiny(**fields):
    c = default()
    c.weights, c.image_size, c.layers, c.batch_size = "random", (32,), ("blocks.2",), 4
    c.detector = "gaussian"
    c.update_from_flattened_dict(fields)
    return fill(c)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_odd_image_is_listed_first_and_can_be_left_out(started, photos, tmp_path, capsys):
    workdir, command = tmp_path / "audit", ["--config=configs/folder.py", *TINY]
    command += [f"--config.data.root={photos}", "--config.audit=0.2"]
    assert started(["--mode=audit", *command, f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "folder: 3 of 12 normal images look most unusual" in out
    assert "   1    8.3%" in out.splitlines()[4]
    assert out.splitlines()[4].endswith("good/7.png")

    found = json.loads((workdir / "audit.json").read_text())
    assert (found["images"], found["listed"]) == (12, 3)
    names = [entry["name"] for entry in found["ranking"]]
    assert sorted(names) == sorted(f"good/{i}.png" for i in range(12))
    scores = [entry["score"] for entry in found["ranking"]]
    assert scores == sorted(scores, reverse=True)
    text = (workdir / "audit.txt").read_text()
    assert [line for line in text.splitlines() if line[0] != "#"] == names[:3]
    page = (workdir / "audit.html").read_text()
    assert page.count("data:image/webp;base64,") == 3
    assert page.index("good/7.png") < page.index(names[1]) < page.index(names[2])
    assert not (workdir / "features").exists()

    exclude = f"--config.data.exclude={workdir / 'audit.txt'}"
    command += ["--config.detector=gaussian", exclude, f"--workdir={tmp_path / 'run'}"]
    assert started(command) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    of_data = results["protocol"]["data"]["folder"]
    assert of_data["excluded_images"] == 3
    assert of_data["trained_on"] + of_data["held_out"] == 9
    assert started(["--mode=audit", *command[:-1], f"--workdir={workdir}"]) == 2
    assert "is a file that this audit would replace" in capsys.readouterr().err


def test_the_report_of_a_run_lists_unusual_images(photos, tmp_path):
    experiment.run(tiny(**{"data.root": str(photos)}), tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert "Normal images that look unusual" in page
    assert "<strong>good/7.png</strong> 8.3 %" in page
    held_out = experiment.run(tiny(**{"data.root": str(photos), "audit": 0.0}), tmp_path / "off")
    assert held_out["protocol"]["data"]["folder"]["held_out"] == 1
    assert "look unusual" not in (tmp_path / "off/report.html").read_text()


def test_latents_of_fastflow_are_compared(photos, tmp_path):
    root = {"data.root": str(photos)}
    fastflow = tiny(**root, **{"detector": "fastflow", "train.steps": 4, "map.bank": 50})
    (found,) = audit.run(fastflow, tmp_path / "audit")
    (without,) = audit.run(tiny(**root), tmp_path / "gaussian")
    assert not (tmp_path / "audit/flow").exists()
    experiment.run(fastflow, tmp_path / "run")
    of_run = json.loads((tmp_path / "run/audit.json").read_text())
    usual = {entry["name"]: entry["score"] for entry in without["ranking"]}
    for each in (found, of_run):
        assert each["ranking"][0]["name"] == "good/7.png"
        assert max(abs(entry["score"] - usual[entry["name"]]) for entry in each["ranking"]) > 0.2


def test_calibration_images_are_audited_and_copies_are_not(photos, tmp_path):
    folder = photos / "calibration/good"
    folder.mkdir(parents=True)
    (photos / "train/good/7.png").rename(folder / "7.png")
    (photos / "train/good/6.png").rename(folder / "6.png")
    fields = {"data.root": str(photos), "data.resize": "pad"}
    (found,) = audit.run(tiny(**fields), tmp_path / "audit")
    assert found["ranking"][0]["name"] == "calibration/good/7.png"
    assert found["images"] == 12
    copies = {"augment.copies": 1, "augment.flips": True}
    experiment.run(tiny(**fields, **copies), tmp_path / "run")
    found = json.loads((tmp_path / "run/audit.json").read_text())
    assert found["images"] == 10


def test_a_run_says_why_it_lists_no_images(photos, tmp_path, caplog):
    caplog.set_level("INFO")
    fields = {"data.root": str(photos), "augment.flips": True}
    experiment.run(tiny(**fields), tmp_path / "run")
    assert "unusual normal images: features of unchanged images are not cached" in caplog.text
    assert not (tmp_path / "run/audit.json").exists()
    for i in range(8):
        (photos / f"train/good/{i}.png").unlink()
    experiment.run(tiny(**{"data.root": str(photos)}), tmp_path / "few")
    assert "unusual normal images: 4 normal images are too few" in caplog.text


def test_names_of_several_categories_begin_with_the_category(tmp_path):
    c = tiny(audit=0.01)
    with c.unlocked():
        name_data(c, "synthetic/brick,gravel")
    found = audit.run(c, tmp_path / "audit")
    assert [each["name"] for each in found] == ["brick", "gravel"]
    name = (tmp_path / "audit/gravel/audit.txt").read_text().splitlines()[-1]
    assert name == found[1]["ranking"][0]["name"]
    assert name.startswith("gravel/")
    (tmp_path / "list.txt").write_text(f"{name}\n")
    with c.unlocked():
        c.data.exclude = str(tmp_path / "list.txt")
    brick, gravel = audit.run(c, tmp_path / "again")
    assert brick["images"] == found[0]["images"]
    assert gravel["images"] == found[1]["images"] - 1


def test_groups_are_not_compared_with_themselves(photos, tmp_path):
    image = photos / "train/good/7.png"
    (photos / "train/good/8.png").write_bytes(image.read_bytes())
    fields = {"data.root": str(photos)}
    groups = {"data.groups": r"good/(\d)"} | fields
    for i in (10, 11):  # in the group of 1.png otherwise
        (photos / f"train/good/{i}.png").unlink()
    (photos / "train/good/8.png").rename(photos / "train/good/7_again.png")
    (found,) = audit.run(tiny(**fields), tmp_path / "alone")
    assert found["ranking"][0]["name"] not in ("good/7.png", "good/7_again.png")
    (found,) = audit.run(tiny(**groups), tmp_path / "grouped")
    names = {entry["name"] for entry in found["ranking"][:2]}
    assert names == {"good/7.png", "good/7_again.png"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"audit": 0.0}, "config.audit is 0"),
        ({"backbone": "pixels", "layers": ("image",)}, "pixels has no features"),
        ({"data.root": "nowhere"}, "does not exist"),
    ],
)
def test_impossible_audits_are_refused(photos, tmp_path, fields, message):
    fields = {"data.root": str(photos)} | fields
    with pytest.raises(InputError, match=message):
        audit.run(tiny(**fields), tmp_path / "audit")


def test_too_few_and_no_images_are_refused(photos, tmp_path):
    for i in range(8):
        (photos / f"train/good/{i}.png").unlink()
    c = tiny(**{"data.root": str(photos)})
    with pytest.raises(InputError, match="4 normal images are too few"):
        audit.run(c, tmp_path / "audit")
    for file in (photos / "train/good").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="has no images"):
        audit.run(c, tmp_path / "audit")
