"""Fixtures of all tests: four host devices, a shared compilation cache, and the command line."""

import contextlib
import logging
import os
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
import pytest
from absl.testing import flagsaver


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Compiles each program once per session, for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its directory is in that of the session
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True)
def _same_numbers(request):
    """A test's module-level generator starts anew: numbers don't depend on the tests before it."""
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
    import fastflow_jax.runs.experiment  # noqa: F401  It defines flags, which must happen once.
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
