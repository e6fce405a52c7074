"""The benchmark runner: output that it reads, time limits, interruption."""

import importlib
import os
import pathlib
import signal
import sys
import textwrap
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import run


def script(folder, body):
    """Writes a benchmark with this body; `ratios` is imported."""
    file = folder / "fake.py"
    start = f"import sys\nsys.path.insert(0, {str(run.HERE)!r})\nfrom outcome import ratios\n"
    file.write_text(start + textwrap.dedent(body))
    return file


def test_ratios_and_tables_are_read(tmp_path):
    body = """
        with ratios() as found:
            found["one_b8"] = 2.5
            found["two"] = 0.00123456
            print("one: a ratio of 3, in prose")
        print("| growth |", "|---|", "| 1 |", sep="\\n")
    """
    found = run.run_one(script(tmp_path, body), [], 60)
    assert found["status"] == "done"
    assert found["ratios"] == {"one_b8": 2.5, "two": 0.00123}
    assert found["table"] == ["| growth |", "|---|", "| 1 |"]


@pytest.mark.parametrize(
    ("then", "status"), [("raise ValueError", "failed"), ("time.sleep(60)", "cut at 2 s")]
)
def test_ratios_before_a_failure_or_the_time_limit_are_kept(tmp_path, then, status):
    body = f"""
        import time
        with ratios() as found:
            found["first"] = 1.5
            {then}
    """
    start = time.perf_counter()
    found = run.run_one(script(tmp_path, body), [], 2)
    assert time.perf_counter() - start < 20
    assert (found["status"], found["ratios"]) == (status, {"first": 1.5})


def test_an_interrupted_runner_ends_the_benchmark_and_keeps_its_ratios(tmp_path):
    ready = tmp_path / "ready"
    body = f"""
        import pathlib, time
        with ratios() as found:
            found["first"] = 1.5
            print("| early |", flush=True)
            pathlib.Path({str(ready)!r}).touch()
            time.sleep(600)
    """

    def interrupt_once_ready():
        while not ready.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    # As in `run.main`. SIGINT may be ignored, as in background processes of a shell.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt_once_ready, daemon=True).start()
        found = run.run_one(script(tmp_path, body), [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (found["status"], found["ratios"]) == ("interrupted", {"first": 1.5})
    assert found["table"] == ["| early |"]  # printed before the interruption


def test_child_processes_of_a_benchmark_end_at_the_time_limit(tmp_path):
    late = tmp_path / "late"
    body = f"""
        import subprocess, time
        code = "import time; time.sleep(4); open({str(late)!r}, 'w')"
        subprocess.Popen([sys.executable, "-c", code])
        time.sleep(60)
    """
    run.run_one(script(tmp_path, body), [], 1)
    time.sleep(4)
    assert not late.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("costs", "detectors", "inference", "memory", "metrics", "our_fastflow", "painted"),
        *("paired", "tables", "time_to_quality", "training_step"),
    ],
)
def test_benchmarks_can_be_imported(name):
    assert importlib.import_module(name).main
