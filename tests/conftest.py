"""Four host devices for everybody, and no waiting for absl to parse flags."""

import contextlib
import os

# Before jax starts: the multi-device tests need several devices in one process, and programs that
# run once on a few numbers take longer to optimise than to run.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Programs that several tests compile are compiled once in a session, whatever the worker."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its folder lies in the session's
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture
def killed_in_the_third_part(monkeypatch):
    """A context in which a run finishes two of its parts and dies in the third."""
    from fastflow_jax import experiment

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
