"""The runner of the benchmarks: what it reads of them, what it writes, and its limit of time."""

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
    """A benchmark of that body, in which `ratios` is at hand."""
    file = folder / "fake.py"
    start = f"import sys\nsys.path.insert(0, {str(run.HERE)!r})\nfrom outcome import ratios\n"
    file.write_text(start + textwrap.dedent(body))
    return file


def test_ratios_and_tables_of_a_benchmark_are_read(tmp_path):
    body = """
        with ratios() as found:
            found["one_b8"] = 2.5
            found["two"] = 0.00123456
            print("one: a ratio of 3, as prose has it")
        print("| growth |", "|---|", "| 1 |", sep="\\n")
    """
    found = run.run_one(script(tmp_path, body), [], 60)
    assert found["status"] == "done"
    assert found["ratios"] == {"one_b8": 2.5, "two": 0.00123}
    assert found["table"] == ["| growth |", "|---|", "| 1 |"]


@pytest.mark.parametrize(
    ("then", "status"), [("raise ValueError", "failed"), ("time.sleep(60)", "cut at 2 s")]
)
def test_what_was_found_before_the_end_is_kept(tmp_path, then, status):
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


def test_an_interrupted_runner_ends_what_runs_and_keeps_what_it_found(tmp_path):
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

    # As `run.main` has it; SIGINT may be ignored, as it is by what a shell runs in the background.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt_once_ready, daemon=True).start()
        found = run.run_one(script(tmp_path, body), [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (found["status"], found["ratios"]) == ("interrupted", {"first": 1.5})
    assert found["table"] == ["| early |"]  # what it had printed by then


def test_what_a_benchmark_has_started_is_cut_with_it(tmp_path):
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


def entry(ratios, status="done", machine="a processor", table=()):
    return {"machine": machine, "status": status, "ratios": ratios, "table": list(table)}


def test_tables_have_a_row_for_each_ratio_of_either_device():
    text = run.tables(
        {
            "cpu": {"inference.py": entry({"one": 2.0, "two": 0.5}, "cut at 9 s")},
            "gpu": {"inference.py": entry({"two": 31.234}, machine="a card")},
        }
    )
    assert "CPU: a processor.\n\nGPU: a card." in text
    assert "| one | 2 | not measured |\n| two | 0.5 | 31.2 |" in text
    assert "CPU: cut at 9 s." in text


def test_a_device_that_was_not_measured_has_no_column():
    text = run.tables({"cpu": {"inference.py": entry({"one": 2.0})}})
    assert "GPU: not measured." in text
    assert "| ratio | CPU |\n|---|---:|\n| one | 2 |" in text


def test_what_a_quick_form_repeats_of_the_full_one_is_left_out():
    full = entry({"one": 2.0}, table=["| full |"])
    quick = entry({"one": 3.0, "two": 4.0}, table=["| quick |"])
    text = run.tables({"cpu": {"memory.py": full, "memory.py --quick": quick}})
    assert "| one | 2 |" in text
    assert "| one | 3 |" not in text
    assert "### `memory.py --quick`\n\n| ratio | CPU |\n|---|---:|\n| two | 4 |" in text
    assert "| full |" in text
    assert "| quick |" not in text
    only_repeats = {"cpu": {"metrics.py": full, "metrics.py --quick": entry({"one": 3.0})}}
    assert "--quick" not in run.tables(only_repeats)
    assert "| quick |" in run.tables({"cpu": {"growth.py --quick": quick}})  # not run in full


def test_the_readme_has_its_lines_from_the_full_form_where_there_is_one(monkeypatch):
    monkeypatch.setattr(run, "HEADLINES", {"one": "the first", "two": "the second"})
    cpu = {
        "b.py --quick": {"ratios": {"one": 9.0, "two": 0.5}},
        "b.py": {"ratios": {"one": 123.4}},
    }
    assert run.headlines({"cpu": cpu}).splitlines()[2:] == [
        "| the first | 123 | not measured |",
        "| the second | 0.5 | not measured |",
    ]


def test_tables_replace_what_stands_between_the_markers():
    document = run.DOCUMENT.read_text()
    once = run.between_markers(document, "| new |")
    assert once.startswith("# Speed")
    assert run.between_markers(once, "| new |") == once
    assert once.count("| new |") == 1
    with pytest.raises(ValueError, match="no <!-- tables -->"):
        run.between_markers("no place", "| new |")


@pytest.mark.parametrize(
    "name",
    [
        *("false_alarms", "growth", "halves", "inference", "linear_probe", "memory", "metrics"),
        *("our_fastflow", "painted", "paired", "training_step"),
    ],
)
def test_what_a_benchmark_takes_from_the_package_is_there(name):
    assert importlib.import_module(name).main
