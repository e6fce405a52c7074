"""Four host devices for everybody, and no waiting for absl to parse flags."""

import contextlib
import logging
import os
import sys
from importlib.metadata import version

# Before jax starts: the multi-device tests need several devices in one process, and programs that
# run once on a few numbers take longer to compile well than to run. The older emitters of code
# compile in a third of the time; versions of jaxlib after 0.10 do not know the flag.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from absl.testing import flagsaver


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Programs that several tests compile are compiled once in a session, whatever the worker."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its folder lies in the session's
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of processes with one device each; what several of them run is compiled once."""
    return os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def started(monkeypatch):
    """The exit status of `python -m fastflow_jax.main` with these words, without a process."""
    import fastflow_jax.runs.experiment  # noqa: F401  Its dependencies define flags, once.
    from fastflow_jax import main

    # Where programs are compiled to is settled for all tests.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def start(words):
        with monkeypatch.context() as patch, flagsaver.flagsaver():
            patch.setattr(sys, "argv", [main.__file__, *words])  # config_flags looks there
            try:
                return main._run(main._parse(sys.argv))
            except SystemExit as end:
                return end.code
            finally:  # for tests that read the log
                logger = logging.getLogger("fastflow_jax")
                logger.handlers, logger.propagate = [], True

    return start


@pytest.fixture
def killed_in_the_third_part(monkeypatch):
    """A context in which a run finishes two of its parts and dies in the third."""
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
