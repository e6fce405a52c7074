"""Fixtures of all tests: four host devices, a shared compilation cache, and the command line."""

import contextlib
import logging
import os
import pathlib
import sys
from importlib.metadata import version

# These flags must be set before jax is imported. Tests with several devices need them in one
# process. Compilation takes most of the time of tests, so it is not optimised, unless
# FASTFLOW_OPTIMISED is set. The older emitters compile in a third of the time; jaxlib versions
# after 0.10 do not have the flag.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_force_host_platform_device_count=4",
        *[
            "--xla_backend_optimization_level=0",
            "--xla_cpu_parallel_codegen_split_count=1",
            *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
        ]
        * ("FASTFLOW_OPTIMISED" not in os.environ),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

_MANY_MAPPINGS = 20_000


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Compiles each program once per session, for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its directory is in that of the session
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Frees compiled programs before the process has too many memory mappings.

    Each program has several, Linux allows 65,530 of a process, and XLA crashes without them.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _same_numbers(request):
    """Resets the module-level generator: numbers do not depend on the tests before it."""
    if (generator := getattr(request.module, "RNG", None)) is not None:
        generator.bit_generator.state = type(generator.bit_generator)(0).state


@pytest.fixture(scope="session")
def environment():
    """Environment of processes with one device each, which share the compilation cache."""
    return os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def compilations():
    """A context that counts the programs that are compiled, or read from the cache on disk."""

    @contextlib.contextmanager
    def context():
        names = []

        def listen(event, seconds, **about):
            if event == "/jax/core/compile/backend_compile_duration":
                names.append(about.get("fun_name"))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return context


@pytest.fixture
def started(monkeypatch):
    """Runs `python -m fastflow_jax.main` with arguments in this process; returns its status."""
    # These define flags, which must happen once.
    import array_record.python.array_record_data_source  # noqa: F401

    import fastflow_jax.runs.experiment  # noqa: F401
    from fastflow_jax import main

    # Keep the compilation cache of the session.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def start(words):
        with monkeypatch.context() as patch, flagsaver.flagsaver():
            patch.setattr(sys, "argv", [main.__file__, *words])  # config_flags reads it
            try:
                return main._run(main._parse(sys.argv))
            except SystemExit as end:
                return end.code
            finally:  # for tests that read the log
                logger = logging.getLogger("fastflow_jax")
                logger.handlers, logger.propagate = [], True
                logger.setLevel(logging.NOTSET)

    return start


@pytest.fixture
def killed_in_the_third_part(monkeypatch):
    """A context in which a run finishes two of its parts and is killed in the third."""
    from fastflow_jax.runs import experiment

    @contextlib.contextmanager
    def context():
        run_part, parts = experiment._run_part, []

        def die_in_the_third(*arguments):
            if len(parts) == 2:
                raise RuntimeError("killed")
            parts.append(run_part(*arguments))
            return parts[-1]

        with monkeypatch.context() as patch:
            patch.setattr(experiment, "_run_part", die_in_the_third)
            with pytest.raises(RuntimeError, match="killed"):
                yield

    return context


@pytest.fixture(scope="session")
def export():
    """Writes an exported detector: the map is the brightness, the score its mean plus `offset`."""
    onnx = pytest.importorskip("onnx", reason="exported detectors need the extra onnx")
    pytest.importorskip("onnxruntime", reason="exported detectors need the extra onnx")
    from fastflow_jax.decision import Threshold
    from fastflow_jax.exported import FORMAT, to_metadata

    make, of = onnx.helper, onnx.TensorProto

    def write(file, offset=0.0, **changes):
        shape = ["batch", 8, 8]
        constant = onnx.numpy_helper.from_array
        graph = make.make_graph(
            [
                make.make_node("Cast", ["images"], ["floats"], to=of.FLOAT),
                make.make_node("ReduceMean", ["floats"], ["grey"], axes=[3], keepdims=0),
                make.make_node("Div", ["grey", "white"], ["anomaly_map"]),
                make.make_node("ReduceMean", ["anomaly_map"], ["mean"], axes=[1, 2], keepdims=0),
                make.make_node("Add", ["mean", "offset"], ["score"]),
            ],
            "detector",
            [make.make_tensor_value_info("images", of.UINT8, [*shape, 3])],
            [
                make.make_tensor_value_info("score", of.FLOAT, ["batch"]),
                make.make_tensor_value_info("anomaly_map", of.FLOAT, shape),
            ],
            [
                constant(np.float32(255), "white"),
                constant(np.float32(offset), "offset"),
            ],
        )
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8)
        fields = {
            "format": FORMAT,
            "version": "0",
            "fingerprint": f"{offset:g}",
            "input": {"height": 8, "width": 8, "resize": "square"},
            "image_threshold": Threshold(0.5),
            "pixel_threshold": Threshold(0.75),
            "held_out": {"scores": [0.1, 0.2, 0.3, 0.4], "groups": None},
            "training_images": None,
            "colour_range": None,
        }
        onnx.helper.set_model_props(model, to_metadata(fields | changes))
        onnx.save(model, file)
        return pathlib.Path(file)

    return write
