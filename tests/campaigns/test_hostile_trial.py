"""A trial of hostile input finds what a reader must not do."""

import contextlib
import os
import pathlib
import pickle
import subprocess
import tempfile

import fuzz
import pytest
from campaign import Options, Skipped, run
from hostile import mutation, sandbox
from hostile.target import Target
from hostile.trial import Trial

from fastflow_jax.errors import InputError

MODULES = ("fastflow_jax.files",)


@pytest.fixture(scope="module")
def lost_by():
    """Losses of a reader that reads one case."""
    watch, before = sandbox.Watch(), pathlib.Path.cwd()

    def try_case(read):
        def read_case(data):
            if data:  # not the valid file
                read()

        target = Target("bad", lambda: [b""], mutation.of_bytes, read_case, MODULES)
        with tempfile.TemporaryDirectory() as folder:
            try:
                trial = Trial(target, watch, pathlib.Path(folder))
                trial.check(b"case")
            finally:
                os.chdir(before)
        return trial.lost

    return try_case


def refuse(message, cause=None):
    raise InputError(message) from cause


def write_through_a_link():
    os.symlink("..", "link")
    pathlib.Path("link/escaped").write_text("")


def write_in_secret():
    with contextlib.suppress(BaseException):
        pathlib.Path("../escaped").write_text("")


@pytest.mark.parametrize(
    "read",
    [
        lambda: pathlib.Path("inside").write_text(""),
        lambda: refuse("case is damaged. Download it again."),
        lambda: refuse("The size must be 1 to 3, not 4."),
    ],
)
def test_a_case_that_is_read_or_refused_is_survived(read, lost_by):
    assert lost_by(read) == []


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda: {}["key"], "KeyError: 'key'"),
        (lambda: refuse("case is damaged."), "without a remedy"),
        (lambda: refuse("x\n" * 1500), "a message of 3000 characters"),
        (lambda: refuse("It is large. Cut it.", MemoryError()), "needs too much memory"),
        (lambda: pathlib.Path("../escaped").write_text(""), "escaped' is opened for writing"),
        (write_through_a_link, "escaped' is opened for writing"),
        (write_in_secret, "escaped' is opened for writing"),
        (lambda: pathlib.Path("../escaped").mkdir(), "os.mkdir of"),
        (lambda: os.rename("../current", "inside"), "os.rename of '../current'"),
        (lambda: eval("1 + 1"), "exec of"),
        (lambda: subprocess.run(["true"]), "subprocess.Popen of"),
        (lambda: pickle.loads(pickle.dumps(os.getcwd)), "pickle.find_class of"),
    ],
)
def test_what_a_reader_must_not_do_is_lost(read, says, lost_by):
    (lost,) = lost_by(read)
    assert says in lost
    assert lost.endswith("| case 63617365")


DEADLY = """
import os
from hostile.target import Target

def read(data):
    if data == b"0":
        os.kill(os.getpid(), 9)

def change(data, rng, others):
    return b"%d" % rng.randrange(5)

TARGETS = (Target("deadly", lambda: [b"1"], change, read, ("fastflow_jax.files",), cases=6),)
"""


def test_a_case_that_ends_the_process_is_lost_and_the_others_are_tried(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    row = run("deadly", lambda options: fuzz.trial("deadly", "deadly", options), Options(tmp_path))
    fuzz.close()
    assert row.survived > 0
    assert row.lost
    assert row.tried >= 6
    assert all("ended with -9" in lost and lost.endswith("| case 30") for lost in row.lost)
    assert row.figures["coverage"] == 0


def test_a_target_without_its_packages_is_skipped_and_the_next_one_is_tried(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import package_that_nobody_has\n")
    (tmp_path / "deadly.py").write_text(DEADLY.replace('b"0"', 'b"none"'))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Skipped, match="No module named 'package_that_nobody_has'"):
        run("needy", lambda options: fuzz.trial("needy", "needy", options), Options(tmp_path))
    row = run("deadly", lambda options: fuzz.trial("deadly", "deadly", options), Options(tmp_path))
    fuzz.close()
    assert (row.survived, row.lost) == (6, [])
