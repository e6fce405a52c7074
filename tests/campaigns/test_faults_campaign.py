"""The short form of the campaign of faults: a case of most trials, with a tiny detector."""

import jax
import pytest

pytest.importorskip("array_record", reason="the campaign prepares a data set")

import campaign
import faults

# The others take longer. Tests of their own cover some: tests/test_main.py kills a training, and
# tests/test_parallel.py one of two processes.
QUICK = (
    "of data preparation",
    "of update",
    "of prediction",
    "full disk",
    "power",
    "SIGTERM",
    "two",
)


@pytest.mark.parametrize("title", [t for t in faults.TRIALS if any(q in t for q in QUICK)])
def test_nothing_is_lost(title, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    try:
        row = campaign.run(title, faults.TRIALS[title], campaign.Options(tmp_path))
    except campaign.Skipped as reason:
        pytest.skip(str(reason))
    assert row.lost == []
    assert row.survived > 0
