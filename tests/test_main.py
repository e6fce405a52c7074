"""Command line: exit statuses, messages, and processes that are killed."""

import importlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from PIL import Image

from fastflow_jax.files import read_lines
from fastflow_jax.report import table
from fastflow_jax.runs import experiment

REPOSITORY = pathlib.Path(__file__).parent.parent
TINY = [
    "--config=configs/synthetic.py:gravel",
    "--config.weights=random",
    "--config.image_size=64",
    "--config.layers=('blocks.2',)",
    "--config.flow.steps=1",
    "--config.flow.kernels=(3,)",
    "--config.flow.hidden_ratio=0.5",
    "--config.map.bank=20",
    "--config.train.epochs=20",
    "--config.heatmaps=2",
]


def start(arguments, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "fastflow_jax.main", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def png_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def numbers(folder):
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return results["categories"], [{k: v for k, v in x.items() if k != "seconds"} for x in lines]


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_epochs(folder, epochs, process):
    file = folder / "metrics.jsonl"
    wait_for(lambda: file.exists() and file.read_text().count("\n") >= epochs, process)


@pytest.fixture(scope="module")
def quiet(environment, tmp_path_factory):
    """Run directory, standard output and standard error of a run with --quiet."""
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, out, err = finish(start([*TINY, "--quiet", f"--workdir={folder}"], environment))
    assert code == 0, err
    return folder, out, err


@pytest.fixture(scope="module")
def undisturbed(quiet):
    return quiet[0]


def test_a_quiet_run_writes_nothing_to_stderr(quiet):
    _, out, err = quiet
    assert err == ""
    assert "image AUROC" in out


def test_a_run_that_is_killed_and_interrupted_continues_bit_for_bit(
    undisturbed, environment, tmp_path
):
    arguments, done = [*TINY, f"--workdir={tmp_path}/run"], 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(arguments, environment)
        wait_for_epochs(tmp_path / "run", done + 2, process)
        process.send_signal(number)
        code, _, err = finish(process)
        if number == signal.SIGKILL:
            with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
                lines.write('{"epoch": 3, "lo')  # as on a full disk
        else:
            assert code == 128 + number, err
            assert "The same command continues from there." in err
            assert "Traceback" not in err
        done = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
    code, _, err = finish(start(arguments, environment))
    assert code == 0, err
    assert numbers(tmp_path / "run") == numbers(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_interrupted_before_training_ends_in_one_message(environment, tmp_path, number):
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    process = start([*TINY, f"--workdir={tmp_path}/run"], environment)
    wait_for((tmp_path / "run" / "config.json").exists, process)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number, err
    assert "interrupted" in err
    assert "The same command continues" in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("is_in_run", [True, False])
def test_a_directory_that_was_removed_is_named(is_in_run, started, tmp_path, monkeypatch, capsys):
    missing = (tmp_path / "run" if is_in_run else tmp_path / "elsewhere") / "metrics.jsonl"
    monkeypatch.setattr(experiment, "run", lambda config, workdir: missing.read_text())
    if not is_in_run:  # a fault of the program
        with pytest.raises(FileNotFoundError):
            started([*TINY, f"--workdir={tmp_path}/run"])
        return
    assert started([*TINY, f"--workdir={tmp_path}/run"]) == 2
    assert f"error: {missing} was removed while it was needed." in capsys.readouterr().err


IGNORED_IN = {
    "garbage collection": """
def callback(phase, info):
    if phase == "start":
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGINT)

gc.callbacks.append(callback)
gc.collect()
""",
    "a finalizer": """
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

Finalized()
""",
}


@pytest.mark.parametrize("place", IGNORED_IN)
def test_ctrl_c_works_where_python_ignores_exceptions(environment, place):
    preamble = "import gc, signal, time\nfrom fastflow_jax.main import handle_signals\n"
    program = f"{preamble}handle_signals()\n{IGNORED_IN[place]}\ntime.sleep(120)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGINT
    assert "Exception ignored" not in done.stderr


def test_a_run_continues_with_another_number_of_devices(undisturbed, environment, tmp_path):
    arguments = [*TINY, f"--workdir={tmp_path}/run"]
    flags = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    four = environment | {"XLA_FLAGS": flags}
    process = start(arguments, four)
    wait_for_epochs(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    code, _, err = finish(start(arguments, environment))
    assert code == 0, err
    _, lines = numbers(tmp_path / "run")
    _, expected = numbers(undisturbed)
    assert [line["epoch"] for line in lines] == [line["epoch"] for line in expected]
    losses = [[line["loss"] for line in run] for run in (lines, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_finished_run_is_not_repeated(undisturbed, started, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert started([*TINY, f"--workdir={undisturbed}"]) == 0
    assert "is finished. To train on changed data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/folder.py", "--config.train.epoch=1"], "Did you mean train.epochs"),
        (["--config=configs/folder.py", "--config.trane.epochs=1"], "Did you mean train.epochs"),
        (["--config=configs/folder.py", "--config.seed=x"], "seed"),
        (["--config=configs/nosuch.py"], "configs/nosuch.py"),
        (["--config=configs/synthetic.py:marble"], "marble"),
        (["--config=configs/folder.py", "--config.data.root=no/such/folder"], "no/such/folder"),
        (["--config=configs/folder.py", "--bogus=1"], "bogus"),
        (["--config", "configs/folder.py", "--config.train.epoch=1"], "Did you mean train.epochs"),
        (
            ["--config=configs/demo.py", "--config.checkpoint_every=0"],
            "checkpoint_every must be from 1",
        ),
        (
            ["--config=configs/ablations.py:kernel/elpv"],
            "no ablation 'kernel'. Choose from kernels",
        ),
        (
            ["--config=configs/ablations.py:steps", "--config.variants.steps_2.flow.step=3"],
            "Did you mean variants.steps_2.flow.steps",
        ),
        (["--config.seed=1"], "config.seed"),
        ([], "--config"),
        (["--mode=predict", "--input=photos", "--output="], "--output is empty"),
        (["--mode=export"], "The command export needs --output"),
        (["--mode=export", "--output=x.onnx", "--config=configs/demo.py"], "Leave --config out"),
        (["--mode=serve", "--model=screws.onnx"], "--model=screws.onnx is not a new NAME=FILE"),
        (["--mode=serve", "--model=a=x.onnx", "--model=a=y.onnx"], "--model=a=y.onnx is not a new"),
        (["--mode=serve"], "is not a directory"),
        (["--config=configs/demo.py", "--threads=0"], "--threads must be at least 1, not 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_bad_input_ends_in_one_message(arguments, message, started, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert started([*arguments, f"--workdir={tmp_path}/run"]) == 2
    assert_one_message(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    "flag", ["workdir", "input", "output", "config.data.root", "config.weights"]
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_url_is_an_error_in_every_flag(flag, started, tmp_path, capsys, monkeypatch):
    flags = {"workdir": f"{tmp_path}/run"}
    if flag in ("input", "output"):
        flags |= {"mode": "predict", "input": f"{tmp_path}", "output": f"{tmp_path}/out"}
    else:
        flags["config"] = REPOSITORY / "configs/folder.py"
    monkeypatch.chdir(tmp_path)
    given = flags | {flag: "gs://bucket/x"}
    assert started([f"--{name}={value}" for name, value in given.items()]) == 2
    assert_one_message(capsys.readouterr().err, "gs://bucket/x is a URL, not a local path. Mount")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_run_directory_may_be_in_the_home_directory(started, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = []
    monkeypatch.setattr(experiment, "run", lambda _, folder: folders.append(folder))
    monkeypatch.setattr(table, "format_table", lambda results: "")
    words = ["--config=configs/folder.py", "--config.detector=fastflow", "--workdir=~/run"]
    assert started(words) == 0
    assert folders == [tmp_path / "run"]


def assert_one_message(err, message):
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3, err


def test_bad_input_ends_a_process_with_one_message(environment):
    arguments = ["--config=configs/folder.py", "--config.train.epoch=1"]
    code, _, err = finish(start(arguments, environment))
    assert code == 2
    assert_one_message(err, "Did you mean train.epochs")


def test_names_that_are_not_utf8_are_printed_and_written(environment, tmp_path):
    root = tmp_path / "b\udce4r [1]"
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    for name in ("train/good/0", "train/good/1", "test/good/0", "test/dent/k_\udce4"):
        file = root / f"images/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png_of(image))
        image = image[::-1] + np.uint8(1)
    mask = root / "images/ground_truth/dent/k_\udce4_mask.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(png_of(np.zeros((32, 32), np.uint8)))  # its name is reported
    arguments = ["--config=configs/folder.py", f"--config.data.root={root}/images"]
    arguments += ["--config.detector=fastflow", "--config.heatmaps=2"]
    arguments += ["--config.backbone=pixels", "--config.train.epochs=1"]
    arguments += ["--config.image_size=16", "--config.flow.steps=1", "--config.map.bank=20"]
    strict = environment | {"PYTHONIOENCODING": "utf-8:strict"}
    code, out, err = finish(start([*arguments, f"--workdir={root}/run"], strict))
    assert code == 0, err
    assert r"dent/k_\udce4.png" in err
    assert rf"Run directory: {tmp_path}/b\udce4r [1]/run" in out
    assert r"dent/k_\udce4.png" in (root / "run/report.html").read_text("utf-8")
    names = [
        image["name"] for image in json.loads((root / "run/scores.json").read_text())["images"]
    ]
    assert "dent/k_\udce4.png" in names
    predict = ["--mode=predict", f"--workdir={root}/run", f"--input={root}/images/test/dent"]
    code, out, err = finish(start([*predict, f"--output={root}/out"], strict))
    assert code in (0, 1), err
    assert rf"{tmp_path}/b\udce4r [1]/out" in out
    assert (root / "out/heatmaps/k_\udce4.png.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_in_one_message(environment, tmp_path):
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()  # of a run that has not begun
    (folder / "config.tmp").symlink_to("/dev/full")
    code, _, err = finish(start([*TINY, f"--workdir={folder}"], environment))
    assert code == 2
    assert "No space left on device" in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_describe_needs_no_data_and_no_weights(started, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    arguments = ["--mode=describe", "--config=configs/folder.py", "--config.flow.steps=1"]
    assert started(arguments) == 0
    out = capsys.readouterr().out
    assert "trainable parameters" in out
    assert any(line.startswith("blocks.") for line in out.splitlines())


def _predicted(environment, run, photo, output, **how):
    arguments = [f"--workdir={run}", f"--input={photo}", f"--output={output}", "--noheatmaps"]
    return subprocess.run(
        [sys.executable, "-m", "fastflow_jax.main", "--mode=predict", *arguments],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        check=False,
        **{"capture_output": True} | how,
    )


@pytest.fixture(scope="module")
def photo(undisturbed, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "a.png"
    path.write_bytes(png_of(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    return path


def test_predict_needs_no_home_or_cache_directory(undisturbed, environment, photo, tmp_path):
    unset = ("JAX_COMPILATION_CACHE_DIR", "HOME")
    plain = {k: v for k, v in environment.items() if k not in unset}
    process = _predicted(plain | {"XDG_CACHE_HOME": ""}, undisturbed, photo, tmp_path / "out")
    assert process.returncode in (0, 1), process.stderr
    assert not list((REPOSITORY / "fastflow_jax").glob("*-cache"))


def test_a_missing_device_ends_in_one_message(undisturbed, environment, photo, tmp_path):
    environment = environment | {"JAX_PLATFORMS": "cuda"}
    process = _predicted(environment, undisturbed, photo, tmp_path / "out")
    assert process.returncode == 2
    assert "JAX found no device for JAX_PLATFORMS='cuda'" in process.stderr
    assert "Traceback" not in process.stderr


def test_predict_works_if_its_output_is_not_read(undisturbed, environment, photo, tmp_path):
    read, write = os.pipe()
    os.close(read)
    how = {"capture_output": False, "stdout": write, "stderr": subprocess.PIPE}
    process = _predicted(environment, undisturbed, photo, tmp_path / "out", **how)
    os.close(write)
    assert process.returncode in (0, 1), process.stderr
    assert "BrokenPipe" not in process.stderr


def test_each_flag_has_a_sentence_of_help():
    main = importlib.import_module("fastflow_jax.main")
    ours = flags.FLAGS.flags_by_module_dict()[main.__name__]
    assert {"config", "workdir", "mode", "quiet"} <= {flag.name for flag in ours}
    for flag in ours:
        text = flag.help.rpartition(">: ")[2]  # after the choices
        text = text.partition(";\n    repeat this option")[0]
        assert re.fullmatch(r"[A-Z][^.]* [^.]*(\.py[^.]*)*\.", text), flag.name


def test_compiled_programs_are_deleted_beyond_the_bound(environment, tmp_path):
    folder = tmp_path / "fastflow_jax"
    folder.mkdir()
    for name, time_used in (("old", 1), ("new", 2)):
        with (folder / name).open("wb") as file:
            file.truncate(2**29 + 1)  # takes no space
        os.utime(folder / name, (time_used, time_used))
    plain = {k: v for k, v in environment.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    arguments = ["--mode=describe", "--config=configs/folder.py", "--config.backbone=pixels"]
    arguments += ["--config.image_size=16", "--config.flow.steps=1"]
    code, _, err = finish(start(arguments, plain | {"XDG_CACHE_HOME": str(tmp_path)}))
    assert code == 0, err
    assert not (folder / "old").exists()
    assert (folder / "new").exists()


def test_tqdm_disable_leaves_only_messages(undisturbed, environment, tmp_path):
    disabled = environment | {"TQDM_DISABLE": "1"}
    arguments = [*TINY, "--config.seeds=2", "--config.train.epochs=1", f"--workdir={tmp_path}/run"]
    code, out, err = finish(start(arguments, disabled))
    assert code == 0, err
    assert "image AUROC" in out
    assert "are cached in memory." in err
    assert "\r" not in err
    assert "it/s" not in err
