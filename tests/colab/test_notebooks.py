"""The notebooks run from top to bottom, in a small setting, on the CPU; outputs are not kept.

The small settings are in cells of this file, which run after the one tagged "parameters".
"""

import json
import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
DEVICES = "--xla_force_host_platform_device_count"
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

TINY = """
SETTINGS = {
    "weights": "random",
    "image_size": (32,),
    "layers": ("blocks.2",),
    "flow.steps": 1,
    "flow.kernels": (1,),
    "map.bank": 20,
    "train.epochs": 2,
    "train.batch_size": 4,
    "batch_size": 4,
    "heatmaps": 4,
    "data.holdout": 0.25,
}
"""
QUICKSTART = f"""{TINY}
from fastflow_jax.data import synthetic

whole = synthetic.paint_dataset
synthetic.paint_dataset = lambda category, train: whole(category, side=48, train=16)
"""
MVTEC = f"""{TINY}
import tarfile
import numpy as np
from PIL import Image
from fastflow_jax.data.tfds import mvtec_ad

mvtec_ad.COUNTS["bottle"] = (8, 4)
bottle = Path("bottle")
for folder, number in (("train/good", 8), ("test/good", 2), ("test/broken", 2)):
    (bottle / folder).mkdir(parents=True)
    for i in range(number):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(bottle / folder / f"{{i:03}}.png")
(bottle / "ground_truth/broken").mkdir(parents=True)
for i in range(2):
    mask = np.uint8(255) * (np.arange(1600).reshape(40, 40) < 400)
    Image.fromarray(mask).save(bottle / f"ground_truth/broken/{{i:03}}_mask.png")
STORAGE.mkdir()
with tarfile.open(STORAGE / "bottle.tar.xz", "w:xz") as archive:
    archive.add(bottle)

import signal
from fastflow_jax.runs import experiment

SETTINGS["evaluate_every"] = 1
measure, calls = experiment.measure, []

def measure_and_stop_once(scored):
    calls.append(scored)
    if len(calls) == 1:
        signal.raise_signal(signal.SIGINT)  # as a notebook's stop button does
    return measure(scored)

experiment.measure = measure_and_stop_once
"""
# A detector without a training.
KNN = """
SETTINGS = {"detector": "knn", "weights": "random", "layers": ("blocks.2",)}
SETTINGS |= {"image_size": (32,), "batch_size": 8}
"""
PIXELS = """
SETTINGS = {"detector": "knn", "backbone": "pixels", "image_size": (16,), "batch_size": 8}
"""
THRESHOLDS = f"{PIXELS}NORMAL, NEW, SPLITS, HELD_OUT, PARTS = 60, 40, 100, (20, 30), 40"
DEPLOY = f"{KNN}ROUNDS = 2"
PRODUCTS = f"{PIXELS}IMAGES = 40"


def run(name, folder, small, stopped_in="none", then=()):
    """The notebook with its outputs, after running it in `folder`.

    `small` runs after the parameters; the cell that holds `stopped_in` may raise, and it and what
    follows it are run again, and `then`.
    """
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient")
    pytest.importorskip("ipykernel", reason="pip install ipykernel")
    notebook = nbformat.read(ROOT / f"colab/{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (at,) = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ())]
    cells.insert(at + 1, nbformat.v4.new_code_cell(small))
    for i, cell in enumerate(cells):
        if stopped_in in cell.source:
            cell.metadata["tags"] = ["raises-exception"]
            cells += [nbformat.v4.new_code_cell(again.source) for again in cells[i:]]
            break
    notebook.cells = [*cells, *map(nbformat.v4.new_code_cell, then)]
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": folder}}
    ).execute()
    return notebook


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(autouse=True)
def _kernel(tmp_path, compiled, monkeypatch):
    """The kernel finds the package, has one device and its own files, and compiles things once."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {DEVICES}=1")
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_quickstart(tmp_path):
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    notebook = run("quickstart", tmp_path, QUICKSTART)
    said = printed(notebook)
    assert "12 painted/good" in said
    p_values = [said.count(f"p {k / 4:.2f}") for k in (1, 2, 3, 4)]  # three are held out
    assert sum(p_values) == 4
    assert "50% asked" in said
    assert pictures(notebook) == 4  # the two highest scores, and the two lowest
    assert (tmp_path / "runs/painted/detector.json").is_file()


def test_mvtec_keeps_its_run_on_storage_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {DEVICES}=4")
    notebook = run(
        "mvtec_tpu", tmp_path, MVTEC, "experiment.run(", then=["print(len(calls), 'calls')"]
    )
    errors = [o for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
    assert [error.ename for error in errors] == ["Interrupted"]
    assert "4 x cpu" in printed(notebook)
    assert "2 calls" in printed(notebook)  # after each of two epochs
    folder = tmp_path / "storage/runs/mvtec-bottle-tf_efficientnet_lite0"
    assert any((folder / "checkpoints").iterdir())
    results = json.loads((folder / "results.json").read_text())
    assert results["protocol"]["dataset"] == "mvtec_ad"
    assert pictures(notebook) == 4


def test_flow_layers(tmp_path):
    notebook = run("flow_layers", tmp_path, "STEPS, DEPTH = 30, 2")
    (nats,) = re.findall(r"(\S+) nats a point", printed(notebook))
    assert float(nats) < 2.84  # the flow has learned more than a Gaussian
    assert pictures(notebook) == 2


def test_thresholds(tmp_path):
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    notebook = run("thresholds", tmp_path, THRESHOLDS)
    said = printed(notebook)
    on_average = re.findall(r"held out: (\S+)% on average", said)
    assert len(on_average) == 2
    assert all(float(share) < 7 for share in on_average)
    flagged = {name: int(share) for share, name in re.findall(r"(\d+)% flagged: (.*)", said)}
    assert len(flagged) == 5
    assert flagged["new images"] <= 12
    assert pictures(notebook) == 5


def test_deploy(tmp_path):
    for package in ("skimage", "onnx", "onnxruntime", "uvicorn", "starlette"):
        pytest.importorskip(package, reason=f"the notebook needs {package}")
    notebook = run("deploy", tmp_path, DEPLOY)
    said = printed(notebook)
    assert re.search("[1-9] held-out and [1-9]", said)
    assert "decisions that differ: 0" in said
    assert "JAX is loaded: False" in said
    scores = re.findall(r"(\S+)   p .*new/([a-z]+)\S*.png", said)
    assert [name for _, name in scores] == ["crack", "good", "good", "patch", "stain"]
    (served,) = re.findall(r'"score": ([\d.-]+)', said)
    assert float(served) == pytest.approx(float(scores[0][0]), abs=0.01)
    assert "exit status 0" in said
    assert pictures(notebook) == 1


def test_products(tmp_path):
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    notebook = run("products", tmp_path, PRODUCTS)
    said = printed(notebook)
    found = dict(re.findall(r"^(\w+_good|coffee) +(\w+) +[na]", said, re.M))
    assert found == {"brick_good": "brick", "gravel_good": "gravel", "coffee": "unknown"}
    assert re.search("gravel_good +as brick: anomalous", said)
    assert said.endswith("brick gravel\n")
    assert pictures(notebook) == 3


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_stripped_and_say_where_they_ran(file):
    notebook = json.loads(file.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "has been run on CPUs only" in "".join(first["source"]).replace("\n", " ")
    assert source(file, 2) == source(NOTEBOOKS[0], 2)  # the cell that installs the package
    assert f'"{file.stem}", tmp_path' in pathlib.Path(__file__).read_text(), "nothing runs it"


def source(file, number):
    return "".join(json.loads(file.read_text())["cells"][number]["source"])


@pytest.mark.parametrize(
    ("checkout", "package"), [(False, "fastflow-jax"), (True, "..")], ids=["release", "checkout"]
)
def test_the_package_is_installed_if_it_is_missing(checkout, package, tmp_path, monkeypatch):
    shells = pytest.importorskip("IPython.core.interactiveshell", reason="pip install ipykernel")
    (tmp_path / "colab").mkdir()
    if checkout:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "colab")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    monkeypatch.setattr("shutil.which", lambda name: None)
    shell, calls = shells.InteractiveShell(), []
    shell.register_magic_function(calls.append, magic_name="pip")
    shell.run_cell(source(NOTEBOOKS[0], 2)).raise_error()
    assert calls == [f'install -q "{package}[demo,hub,onnx,serve]" matplotlib']
