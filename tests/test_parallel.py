"""Several processes on one machine: equal results, and the end of one of them."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastflow_jax import Detector, parallel
from fastflow_jax.errors import InputError

REPOSITORY = pathlib.Path(__file__).parent.parent
EPOCHS = 4
TINY = [
    "--config=configs/folder.py",
    "--config.detector=fastflow",
    "--config.weights=random",
    "--config.image_size=32",
    "--config.layers=('blocks.2',)",
    "--config.flow.steps=1",
    "--config.flow.kernels=(3,)",
    "--config.flow.hidden_ratio=0.5",
    "--config.map.bank=20",
    f"--config.train.epochs={EPOCHS}",
    "--config.train.batch_size=4",
    "--config.train.window=2",  # of maps of 4x4
    "--config.batch_size=4",
    "--config.train.optimizer=sgd",  # Adam would hide a gradient that is wrong by a factor
    "--config.heatmaps=2",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Numbers of images that are multiples of neither two processes nor batches of four."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for kind, n in {"train/good": 8, "test/good": 4, "test/scratch": 3}.items():
        (root / kind).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((40, 36)).save(root / kind / f"{i}.png")
    (root / "ground_truth/scratch").mkdir(parents=True)
    for i in range(3):
        mask = np.zeros((36, 40), np.uint8)
        mask[8 : 16 + 4 * i, 8:24] = 255
        Image.fromarray(mask).save(root / f"ground_truth/scratch/{i}_mask.png")
    return [*TINY, f"--config.data.root={root}"]


def start(arguments, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "fastflow_jax.main", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(arguments, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [*arguments, f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [start([*together, f"--process={i}"], environment) for i in (0, 1)]


def finish(*processes):
    try:
        ends = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def run(arguments, environment, folder):
    ((code, _, err),) = finish(start([*arguments, f"--workdir={folder}"], environment))
    assert code == 0, err
    return folder


def assert_same_run(one, two):
    """Asserts equal results and curves, up to the rounding of sums in another order."""
    for name, field in (("results.json", "mean"), ("part.json", "figures")):
        figures = [json.loads((folder / name).read_text())[field] for folder in (one, two)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-3)
    scores = [json.loads((folder / "scores.json").read_text())["images"] for folder in (one, two)]
    assert len(scores[0]) == len(scores[1]) == 7
    for image, other in zip(*scores, strict=True):
        assert image["name"] == other["name"]
        assert image["score"] == pytest.approx(other["score"], rel=1e-3, abs=1e-3)
    assert_same_curves(one, two)
    arrays = [np.load(next(folder.glob("calibration_*.npz"))) for folder in (one, two)]
    for name in arrays[0]:
        both = [each[name] for each in arrays]
        # Banks have single vectors of order 1, computed from cached float16 features and rounded to
        # float16: they may differ by a few of its steps, 2^-10. The other arrays are means.
        atol = 4 * 2**-10 if name.startswith(("features", "latents")) else 1e-5
        np.testing.assert_allclose(*both, rtol=1e-4, atol=atol, err_msg=name)
    pictures = [{p.name for p in (folder / "heatmaps").rglob("*.png")} for folder in (one, two)]
    assert pictures[0] == pictures[1]


def assert_same_curves(one, two):
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for name in ("loss", "holdout_loss"):
        np.testing.assert_allclose(
            *([line[name] for line in each] for each in lines), rtol=1e-5, err_msg=name
        )


@pytest.fixture(scope="module")
def alone(command, environment, tmp_path_factory):
    return run(command, environment, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:abc", ":80", "a:0", "a:99999"])
def test_an_invalid_address_is_an_error(address):
    with pytest.raises(InputError, match="is not HOST:PORT"):
        parallel.start(address, 2, 0)


def test_a_port_in_use_is_an_error():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"{port}: process 0 cannot listen"):
            parallel.start(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(("kind", "name"), [("pmap", "run"), ("jit", "run [2]")])
def test_two_processes_give_the_results_of_one(kind, name, alone, command, environment, tmp_path):
    arguments = [*command, f"--config.parallel={kind}", f"--workdir={tmp_path}/{name}"]
    first, second = finish(*start_two(arguments, environment))
    assert first[0] == 0, first[2]
    assert second[0] == 0, second[2]
    assert "image AUROC" in first[1]
    assert "AUROC" not in second[1]
    assert "epoch" not in second[2]  # no bar
    assert_same_run(alone, tmp_path / name)
    assert Detector.load(tmp_path / name).folder == tmp_path / name


def test_two_processes_train_two_seeds_at_once(command, environment, tmp_path):
    other = ["--config.weights", "--config.layers", "--config.image_size"]  # the same for all seeds
    command = [a for a in command if a.partition("=")[0] not in other]
    command += ["--config.backbone=pixels", "--config.seeds=2", "--config.report=False"]
    run(command, environment, tmp_path / "one_by_one")
    at_once = [*command, "--config.train.seeds_at_once=2", f"--workdir={tmp_path}/at_once"]
    ends = finish(*start_two(at_once, environment))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "train, 2 seeds" in ends[0][2]
    results = [tmp_path / name / "results.json" for name in ("one_by_one", "at_once")]
    seeds = [json.loads(file.read_text())["seeds"] for file in results]
    for seed in ("0", "1"):
        (figures,), (others,) = (each[seed].values() for each in seeds)
        assert figures == pytest.approx(others, abs=1e-3)
        assert_same_curves(*(file.parent / f"seed_{seed}" for file in results))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_process_continues_a_run_that_two_began(number, alone, command, environment, tmp_path):
    arguments = [*command, f"--workdir={tmp_path}/run"]
    processes = start_two([*arguments, "--config.evaluate_every=1"], environment)
    saved = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 240
    while not (saved.exists() and any(p.name.isdigit() for p in saved.iterdir())):
        assert all(p.poll() is None for p in processes), finish(*processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(number)
    ends = finish(*processes)
    assert not (tmp_path / "run" / "results.json").exists()
    if number == signal.SIGTERM:
        assert [code for code, *_ in ends] == [128 + number] * 2, ends
        assert all("The same command continues from there." in err for *_, err in ends)
    else:
        assert ends[0][0] not in (0, -signal.SIGKILL), ends
        assert "another process" in ends[0][2] or "another task died" in ends[0][2]
    run([*command, "--config.evaluate_every=1"], environment, tmp_path / "run")
    assert_same_run(alone, tmp_path / "run")


def in_each_of(processes, function):
    """Yields the result of `function` in each simulated process."""
    with mock.patch.object(jax, "process_count", return_value=processes):
        for i in range(processes):
            with mock.patch.object(jax, "process_index", return_value=i):
                yield function()


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(2, 5))
def test_each_image_is_read_by_one_process_and_padding_comes_last(n, size, processes):
    rows = np.random.default_rng(n).permutation(n)
    sizes = []

    def read(rows, size):
        sizes.append(size)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))

    with mock.patch.object(parallel, "_exchange", lambda part, n: (part, n)):
        shares = list(in_each_of(processes, lambda: list(parallel.shared_out(read, rows, size))))
    for i, parts in enumerate(zip(*shares, strict=True)):  # a batch, from all processes
        parts, (n_batch, *others) = zip(*parts, strict=True)
        assert set(others) <= {n_batch}
        whole = np.concatenate(parts)[:n_batch]
        np.testing.assert_array_equal(whole, rows[i * size : i * size + size])
        assert len({len(part) for part in parts}) == 1
    assert set(sizes) == {-(-size // processes)}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_columns_of_a_batch(processes):
    index = np.arange(24).reshape(2, 12)
    own = list(in_each_of(processes, lambda: parallel.columns(index)))
    np.testing.assert_array_equal(np.concatenate(own, 1), index)


@pytest.mark.parametrize("kind", parallel.KINDS)
@pytest.mark.parametrize("n", [3, 4, 9])  # fewer than devices, and more than the batch size
@pytest.mark.parametrize("state", [None, 2.0])
def test_per_example_keeps_the_arrays_of_a_batch_aligned(kind, n, state):
    a, b = np.arange(n * 6.0).reshape(n, 2, 3), np.arange(n) + 1.0
    run = parallel.per_example(
        lambda state, batch: batch[0][0].sum(1) * batch[0][1][:, None], kind, 4
    )
    np.testing.assert_allclose(run(state, ((a, b), None)), a.sum(1) * b[:, None], rtol=1e-6)


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_a_step_is_compiled_once_for_all_shardings_of_its_state(kind):
    traces = []

    def add(state, batch, weight, axis_name):
        traces.append(1)
        return state + parallel.total((weight * batch).sum(), axis_name)

    step = parallel.step(add, kind)
    state = jnp.zeros(())  # on one device; later states are where the step puts them
    for _ in range(3):
        state = step(state, np.ones(4, np.float32), np.ones(4, np.float32))
    step(jnp.zeros(()), np.ones(4, np.float32), np.ones(4, np.float32))
    assert len(traces) == 1
    assert float(state) == 12.0


def test_a_program_that_runs_once_has_the_usual_numbers_and_can_be_traced():
    def draw(key):
        return jax.random.normal(key, (100,))

    once, key = parallel.run_once(draw), jax.random.key(0)
    np.testing.assert_allclose(once(key), jax.jit(draw)(key), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(once)(key), once(key), rtol=1e-5)
    assert jax.eval_shape(once, key).shape == (100,)


def test_available_host_memory_is_plausible():
    assert 2**20 < parallel.available_host_memory() < 2**50


@pytest.mark.parametrize(
    ("limit", "statistics", "name"),
    [
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ],
)
def test_the_memory_limit_of_a_container_counts(tmp_path, monkeypatch, limit, statistics, name):
    monkeypatch.setattr(parallel, "_CGROUP_ROOT", tmp_path)
    before = parallel.available_host_memory()
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("3000000\n")
    (tmp_path / statistics).write_text(f"file 5000000\n{name} 1000000\n")
    assert parallel.available_host_memory() == 2_000_000 < before


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="threads are not listed")
@pytest.mark.parametrize("n", [1, 3])
def test_nproc_sets_the_number_of_threads(n, environment):
    code = """
import pathlib
import jax
jax.block_until_ready(jax.numpy.ones((99, 99)) @ jax.numpy.ones((99, 99)))
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(names.count("tf_XLAEigen"))
"""
    command, environment = [sys.executable, "-c", code], environment | {"NPROC": str(n)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(n)
