"""Training: caching, seeds at once and interruptions change nothing."""

import functools
import json
import os
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastflow_jax import parallel
from fastflow_jax.config import default
from fastflow_jax.data.pipeline import Batch
from fastflow_jax.detectors.fastflow.scorer import objective
from fastflow_jax.errors import InputError, Interrupted
from fastflow_jax.features.cache import Rows
from fastflow_jax.features.extract import cached_features, recomputed_features
from fastflow_jax.training import loop as training
from fastflow_jax.training.checkpoints import Checkpoints
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import Run, train, train_variables
from fastflow_jax.training.step import create_optimizer, create_state

N = 11  # neither the batch size nor the number of devices divides it


def images(n=N):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(n, *s)).astype(np.float32) for s in [(3, 2, 4), (2, 2, 5)])


FEATURES = cached_features(images())
# Of images of 6x4 pixels, some with padding above and below.
VALID = np.ones((N, 6, 4), bool)
VALID[2:5, [0, 1, -1]] = False


@pytest.fixture
def config():
    return small()


def small():
    c = default()
    c.train.epochs = 3
    c.train.batch_size = 4
    c.train.window = 2  # of the larger map's three rows
    c.batch_size = 4
    c.train.optimizer = "sgd"  # Adam would hide a gradient that is wrong by a factor
    c.train.learning_rate = 0.05
    c.parallel = "jit"
    c.flow.update(norm="whiten", steps=1, kernels=(3,), hidden_ratio=1.0, out_kernel=0)
    c.flow.update(affine="softplus", zero_init=False)
    return c


def run(config, folder, features=None, **arguments):
    """Train in `folder`; returns the state and the lines of metrics.jsonl."""
    folder.mkdir(exist_ok=True)
    metrics = folder / "metrics.jsonl"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        features = features or FEATURES
        (state,) = train(
            FitContext(config, features, folder, holdout=images(3)),
            objective(config, features.statistics("whiten")),
            [Run(0, checkpoints, metrics)],
            **arguments,
        )
    return state, lines_of(folder)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_seeds(config, folder, seeds, **arguments):
    """Trains the first seed, and its siblings in the same program if the configuration says so.

    Images with padding, a loss that draws, and gradients that are clipped.
    """
    config.train.clip = 0.5
    features = cached_features(images(), VALID)
    nll = objective(config, features.statistics("whiten"))
    for seed in seeds:
        (folder / f"{seed}").mkdir(parents=True, exist_ok=True)
    first, *others = [(seed, folder / f"{seed}") for seed in seeds]
    context = FitContext(
        config, features, first[1], first[0], images(3), VALID[1:4], tuple(others), **arguments
    )
    train_variables(context, noisy(nll), lambda variables, seed: (variables, seed))


@functools.cache
def noisy_loss(loss):
    def noisy(variables, features, valid, keys):
        noise = jax.vmap(jax.random.normal)(keys)
        return loss(variables, features, valid, keys) * (1 + 0.1 * noise)

    return noisy


def noisy(nll):
    return nll._replace(loss=noisy_loss(nll.loss))


def kept(config, folder):
    """The state of the latest checkpoint, and the lines without the time that they took."""
    optimizer = create_optimizer(config.train, 9)
    fresh = partial(create_state, objective(config), optimizer, FEATURES.shapes, 0)
    template = jax.eval_shape(fresh)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(checkpoints.latest, template)
    return state, [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(folder)]


def assert_close(one, two, rtol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), one, two)


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_per_example_pads_short_batches(kind):
    double = parallel.per_example(lambda state, x: (state * x, x.sum(-1)), kind, 6)
    for n in (6, 5, 1):
        x = np.arange(n * 3, dtype=np.float32).reshape(n, 3)
        y, total = double(jnp.float32(2), x)
        np.testing.assert_array_equal(y, 2 * x)
        np.testing.assert_array_equal(total, x.sum(-1))


def test_a_wrong_kind_of_parallelism_is_named():
    with pytest.raises(InputError, match=r"parallel is 'pjit'\. It must be one of pmap, jit"):
        parallel.step(lambda *a, axis_name: a[0], "pjit")


def drawn(epoch, rows, size):
    """Batches of images, for `recomputed_features`."""
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        yield Batch(images()[0][part], None, np.zeros(len(part)), part)


def test_training_is_equal_on_cached_and_recomputed_features(config, tmp_path):
    def extract(batch):  # stands for a backbone; takes what its batch size allows, no more
        assert len(batch) <= 4
        return batch, np.concatenate([batch[:, :2], batch[:, 1:, :, :1]], -1) ** 2

    parts = np.array_split(images()[0], 3)
    whole = tuple(map(np.concatenate, zip(*map(extract, parts), strict=True)))
    one, _ = run(config, tmp_path / "cached", cached_features(whole))
    recomputed = recomputed_features(N, drawn, extract, 4)
    assert recomputed.cached is None
    two, _ = run(config, tmp_path / "recomputed", recomputed)
    assert_close(one.params, two.params)
    assert_close(one.constants, two.constants)


def test_a_program_per_epoch_equals_a_program_per_step(config, tmp_path):
    half = tuple(m.astype(np.float16) for m in images(2 * N))
    rows = np.arange(0, 2 * N, 2)
    part = tuple(Rows(m, rows) for m in half)
    one, lines = run(config, tmp_path / "steps", cached_features(tuple(m[rows] for m in half)))
    two, epochs = run(config, tmp_path / "epochs", cached_features(part, on_device=True))
    assert_close(one.params, two.params)
    assert_same(one.constants, two.constants)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in epochs])


@pytest.fixture
def devices(monkeypatch):
    """A function that leaves only so many devices."""

    def leave(n):
        some = jax.devices()[:n]
        for name in ("devices", "local_devices"):
            monkeypatch.setattr(jax, name, lambda: some)
        for name in ("device_count", "local_device_count"):
            monkeypatch.setattr(jax, name, lambda: n)
        forget()

    def forget():
        training._programs.cache_clear()
        training._validation.cache_clear()

    yield leave
    forget()


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """Four seeds, each trained for itself and step by step."""
    config, folder = small(), tmp_path_factory.mktemp("one_by_one")
    for seed in range(4):
        run_seeds(config, folder, [seed])
    return folder


def assert_same_seeds(config, folder, expected, seeds):
    for seed in seeds:
        (one, lines), (other, others) = (kept(config, f / f"{seed}") for f in (folder, expected))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, other)
        assert lines == [pytest.approx(line, rel=1e-4) for line in others]


@pytest.mark.parametrize(
    ("seeds", "n_devices", "kind"),
    [(3, 1, "pmap"), (4, 2, "pmap"), (3, 4, "pmap"), (3, 4, "jit")],
    ids=["one device", "devices share the seeds", "or batches", "or batches by jit"],
)
def test_seeds_trained_at_once_equal_single_seeds(
    config, tmp_path, devices, one_by_one, seeds, n_devices, kind
):
    devices(n_devices)
    config.parallel, config.train.seeds_at_once = kind, 4
    epochs = []
    seen = {"on_epoch": lambda epoch, make_scorer: epochs.append(epoch) or {"told": len(epochs)}}
    run_seeds(config, tmp_path, range(seeds), **seen)
    assert epochs == sorted([1, 2, 3] * seeds)
    for seed in range(seeds):
        lines = lines_of(tmp_path / f"{seed}")
        assert [line.pop("told") for line in lines] == [i * seeds + seed + 1 for i in range(3)]
        (tmp_path / f"{seed}/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert_same_seeds(config, tmp_path, one_by_one, range(seeds))


def test_interrupted_seeds_at_once_are_continued(config, tmp_path, one_by_one, monkeypatch):
    config.train.seeds_at_once = 3

    def stopping_after(calls):
        """The first so many calls of `on_epoch`."""
        numbers = iter(range(1, 100))

        def on_epoch(epoch, make_scorer):
            if next(numbers) == calls:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        return on_epoch

    with pytest.raises(Interrupted, match=r"epoch 2\.0; saved"):
        run_seeds(config, tmp_path, range(4), on_epoch=stopping_after(4))
    assert not (tmp_path / "3/metrics.jsonl").exists()  # one too many
    # As if it had been killed while it saved: one seed is an epoch behind.
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(Interrupted, match=r"epoch 1\.0; saved"):
        run_seeds(config, tmp_path, [1], on_epoch=stopping_after(1))
    at_once = []
    programs_of = training._programs
    monkeypatch.setattr(training, "_programs", lambda *a: at_once.append(a[-1]) or programs_of(*a))
    for seed in range(4):  # each in its turn; the last is alone
        run_seeds(config, tmp_path, range(seed, 4))
    assert at_once == [2, 1, 1]
    assert_same_seeds(config, tmp_path, one_by_one, range(4))


def test_seeds_at_once_need_features_in_memory(config):
    on_host, on_device = cached_features(images()), cached_features(images(), on_device=True)
    assert training.at_once(config, on_host) == 1
    assert training.at_once(config, on_device) > 1000
    config.train.seeds_at_once = 2
    assert training.at_once(config, on_host) == training.at_once(config, on_device) == 2
    assert training.at_once(config, recomputed_features(N, drawn, lambda x: (x,), 4)) == 1


def test_too_little_memory_for_seeds_at_once_is_reported_with_a_remedy(
    config, tmp_path, monkeypatch
):
    def full(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(training, "_programs", lambda *a: training._Programs(None, full))
    config.train.seeds_at_once = 3
    with pytest.raises(InputError, match=r"too little memory for 3 seeds .*train\.seeds_at_once=1"):
        run_seeds(config, tmp_path, range(3))


def test_a_reversible_flow_trains_as_an_ordinary_one(config, tmp_path):
    config.parallel = "pmap"
    one, lines = run(config, tmp_path / "plain")
    config.flow.reversible = True
    two, others = run(config, tmp_path / "reversible")
    assert_close(one.params, two.params, rtol=1e-4)
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # The checkpoint of one is that of the other.
    config.train.epochs = 4
    after, _ = run(config, tmp_path / "plain")
    assert int(after.step) == 12


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, *run(small(), folder)


def test_metrics_and_checkpoints(undisturbed):
    folder, state, lines = undisturbed
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert lines[-1]["loss"] < lines[0]["loss"]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.latest == 9
        assert_same(checkpoints.restore(9, state), state)


def test_steps_are_rounded_to_epochs_up_to_max_epochs(config, tmp_path):
    config.train.epochs, config.train.steps = None, 7  # 3 steps an epoch
    assert int(run(config, tmp_path / "one")[0].step) == 6
    config.train.steps, config.train.max_epochs = 1000, 4
    assert int(run(config, tmp_path / "two")[0].step) == 12


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:

        def fail(*arguments, **keywords):
            raise ValueError("RESOURCE_EXHAUSTED: Error: No space left on device [os_error_code]")

        monkeypatch.setattr(checkpoints._orbax, "save_async", fail)
        with pytest.raises(InputError, match=r"No space is left to write .*Free some space"):
            checkpoints.save(1, {"x": jnp.zeros(1)})


@pytest.mark.parametrize("stop_at", [4, 6, 9])  # within an epoch, at its end, at the very end
def test_an_interrupted_training_equals_an_uninterrupted_one(
    config, undisturbed, tmp_path, stop_at, monkeypatch
):
    _, expected, lines = undisturbed
    programs_of = training._programs

    def stopping(*arguments):
        programs = programs_of(*arguments)

        def step(begin, *batch):
            if int(begin[0].step) + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return programs.step(begin, *batch)

        return programs._replace(step=step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_programs", stopping)
        with pytest.raises(Interrupted) as stop:
            run(config, tmp_path / "run")
    assert stop.value.exit_code == 128 + signal.SIGTERM
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest == stop_at
    resumed, resumed_lines = run(config, tmp_path / "run")
    assert_same(resumed, expected)

    def numbers(lines):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert numbers(resumed_lines) == numbers(lines)


def test_a_signal_during_the_last_save_interrupts(config, tmp_path, monkeypatch):
    save = Checkpoints.save

    def stopping(checkpoints, step, *arguments):
        save(checkpoints, step, *arguments)
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(Interrupted, match="saved"):
            run(config, tmp_path / "run")
    _, lines = run(config, tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 9]


def test_epochs_without_a_checkpoint_are_logged_once(config, tmp_path):
    config.train.epochs = 2
    run(config, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:  # as a killed process leaves them
        file.write('{"epoch": 3, "step": 9, "loss": 0.0}\n{"epoch": 4, "st')
    config.train.epochs = 3
    _, lines = run(config, tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[2]["loss"] != 0.0


def test_diverging_training_is_reported_with_a_remedy(config, tmp_path):
    config.train.learning_rate, config.train.clip = 1e9, 0.0
    with pytest.raises(
        InputError, match=r"diverged in epoch .*lower --config\.train\.learning_rate"
    ):
        run(config, tmp_path / "run")
