"""The order of the packages: none imports from a later one."""

import ast
import pathlib
import subprocess
import sys

import pytest

import fastflow_jax

ROOT = pathlib.Path(fastflow_jax.__file__).parent
ORDER = [
    *("errors", "parallel", "files", "state", "flows", "decision", "data", "prediction"),
    *("backbones", "features", "training", "detectors", "config", "evaluation", "exported"),
    *("report", "runs", "scoring", "export", "teach", "detector", "serve", "predict"),
    *("finetune", "migrate", "update", "batch", "submission", "cli", "main"),
]
DEVICES = {"devices", "local_devices", "device_put", "default_backend", "device_count"}
DEVICES |= {"local_device_count", "process_count", "process_index", "process_indices"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in ORDER)


def package(module: str) -> str | None:
    """The first part of a module's name below fastflow_jax."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastflow_jax" and len(parts) > 1 else None


def imported(path: pathlib.Path) -> set[str]:
    """The packages of fastflow_jax that a module imports from, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastflow_jax":
            found |= {name.name for name in node.names if name.name in ORDER}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(package(node.module))
        elif isinstance(node, ast.Import):
            found |= {package(name.name) for name in node.names}
    return found - {None}


def test_all_packages_have_a_place_in_the_order():
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert names - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_from_a_later_package(path):
    own = ORDER.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    later = {name for name in imported(path) if ORDER.index(name) > own}
    assert not later


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_parallel_knows_devices_and_processes(path):
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "jax"
        and node.attr in DEVICES
    }
    assert not used or path.name == "parallel.py"


def test_flow_layers_load_jax_and_flax_alone():
    code = """
import sys
import jax, flax.linen, flax.nnx
before = {name.partition(".")[0] for name in sys.modules}
import fastflow_jax.flows, fastflow_jax.flows.nnx
new = {name.partition(".")[0] for name in sys.modules} - before
print(sorted(new - {"fastflow_jax"}))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


def test_exported_detectors_load_neither_jax_nor_scipy():
    code = """
import sys
import fastflow_jax.exported
print(sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(ast.literal_eval(process.stdout)) >= {"PIL", "fastflow_jax", "numpy"}
    assert not set(ast.literal_eval(process.stdout)) & {"jax", "scipy", "ml_collections", "sklearn"}


def test_the_detector_loads_no_package_that_is_needed_later():
    code = """
import sys
from fastflow_jax import Detector
print(sorted(sys.modules))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(process.stdout))
    assert {"fastflow_jax.detector.detector", "jax", "scipy"} <= loaded
    of_scipy = {f"scipy.{name}" for name in ("cluster", "ndimage", "optimize", "special", "stats")}
    later = {"grain", "onnx", "onnxruntime", "optax", "orbax", "sklearn", "tensorflow_datasets"}
    assert not loaded & (of_scipy | later)
