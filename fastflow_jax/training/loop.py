"""The training loop: epochs of one seed or several, progress, checkpoints, signals, resume."""

import contextlib
import functools
import json
import operator
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import Features, TrainingFeatures, in_batches
from fastflow_jax.files import read_lines, write_text
from fastflow_jax.training.checkpoints import Checkpoints
from fastflow_jax.training.step import (
    Objective,
    TrainState,
    create_optimizer,
    create_state,
    epoch_order,
    train_epoch,
    train_step,
)


class Run(NamedTuple):
    """One of the trainings of `train`: what it draws from, and where it is kept."""

    seed: int  # of parameters, order and whatever the loss draws
    checkpoints: Checkpoints
    metrics_file: pathlib.Path  # gets a JSON line an epoch, however often the run is resumed


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: what is saved is saved, and the same command goes on from there."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"interrupted {where}")
        self.exit_code = 128 + signum


@contextlib.contextmanager
def signals_set_a_flag() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list; a second one acts at once, as it did before."""
    received: list[int] = []
    previous = {}

    def handler(signum, frame):
        received.append(signum)
        for number, old in previous.items():
            signal.signal(number, old)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, as in some notebooks: signals stay as they are
        pass
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def signalled(received: list[int]) -> int:
    """The signal that a process has got, or 0: the same in all of them."""
    return parallel.any_process(received[0] if received else 0)


def train(
    config,
    objective: Objective,
    features: TrainingFeatures,
    holdout: Features | None,
    holdout_valid: np.ndarray | None = None,
    *,
    runs: Sequence[Run],
    on_epoch: Callable[[int, TrainState, int], dict] = lambda epoch, state, seed: {},
    progress: str = "train",
) -> TrainState:
    """Train to the end of the configuration, from the latest checkpoints where there are any.

    Args:
      config: filled, see `config.fill`.
      objective: what is trained.
      features: of the training images.
      holdout: features of held-out normal images; `objective.validation` of them picks the best
        checkpoint.
      holdout_valid: bool [N, H, W], False in their padding; None without padding.
      runs: one, or as many as `at_once` allows, all with their latest checkpoints at the same step
        or none: these take each epoch in one program.
      on_epoch: called after each epoch of each run with its number, from 1 on, the state and the
        run's seed; what it returns goes into the epoch's line.
      progress: label of the progress bar.

    Returns:
      The state of the first run; what the others came to is in their checkpoints.

    Raises:
      Interrupted: SIGTERM or SIGINT came; the states are saved.
      InputError: a loss is no longer finite, or the devices have no room for so many runs at once.
    """
    order = partial(
        epoch_order,
        features.n,
        config.train.batch_size,
        drop_last=config.train.drop_last,
        multiple=parallel.n_devices(),
    )
    steps = len(order(seed=0, epoch=0)[0])
    epochs = config.train.epochs
    if epochs is None:
        epochs = min(config.train.max_epochs, max(1, round(config.train.steps / steps)))
    optimizer = _optimizer(FrozenConfigDict(config.train), epochs * steps)

    def begin(run):
        fresh = partial(create_state, objective, optimizer, features.shapes, run.seed)
        latest = run.checkpoints.latest
        return fresh() if latest is None else run.checkpoints.restore(latest, jax.eval_shape(fresh))

    def save(lines):
        for run, state, line in zip(runs, states, lines, strict=True):
            run.checkpoints.save(int(state.step), state, line.get("holdout_loss"))
            if len(runs) > 1 and parallel.n_processes() > 1:
                # Two that are written at once would meet at one and the same barrier of Orbax.
                run.checkpoints.wait()

    first, position = divmod(runs[0].checkpoints.latest or 0, steps)
    if first == epochs:
        return begin(runs[0])
    states = [begin(run) for run in runs]
    for run in runs:
        _keep_epochs(run.metrics_file, first)
    holdout_losses = _holdout_losses(config, objective, holdout, holdout_valid, len(runs))
    run_epoch = _epoch_runner(config, objective, optimizer, features, [run.seed for run in runs])
    bar = tqdm(
        total=epochs * steps,
        initial=first * steps + position,
        desc=progress if len(runs) == 1 else f"{progress}, {len(runs)} seeds",
        unit="step",
        dynamic_ncols=True,
    )
    with bar, signals_set_a_flag() as received:
        for epoch in range(first, epochs):
            start = time.perf_counter()
            orders = [order(seed=run.seed, epoch=epoch) for run in runs]
            batches = [tuple(parallel.columns(a)[position:] for a in each) for each in orders]
            if position == 0:
                zero = jnp.zeros(())
                states = [s.replace(epoch_loss=zero, epoch_images=zero) for s in states]
            for after in run_epoch(states, epoch, batches):
                states = after
                done = int(states[0].step) - epoch * steps
                bar.update(done - position)
                position = done
                signum = signalled(received)
                if signum and position < steps:
                    save([{} for _ in runs])
                    at = epoch + position / steps
                    raise Interrupted(signum, f"at epoch {at:.1f}; saved")
            position = 0
            lines = _lines(epoch + 1, states, holdout_losses)
            seconds = round((time.perf_counter() - start) / len(runs), 3)  # the share of each
            for run, state, line in zip(runs, states, lines, strict=True):
                line["seconds"] = seconds
                line |= on_epoch(epoch + 1, state, run.seed)
                # The line stands before its checkpoint does, so that no saved epoch can lack one.
                if parallel.is_main():
                    with run.metrics_file.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            losses = ", ".join(f"{line['loss']:.4g}" for line in lines)
            bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {losses}", False)
            last = epoch + 1 == epochs
            signum = signalled(received)
            if last or signum or (epoch + 1) % config.checkpoint_every == 0:
                save(lines)
                signum = signalled(received)  # or in the meantime
            if signum:
                raise Interrupted(signum, f"at epoch {epoch + 1:.1f}; saved")
    return states[0]


def _lines(epoch: int, states: Sequence[TrainState], holdout_losses) -> list[dict]:
    """What each run has to tell of an epoch."""
    lines = [
        {"epoch": epoch, "step": int(s.step), "loss": float(s.epoch_loss / s.epoch_images)}
        for s in states
    ]
    if holdout_losses is not None:
        for line, loss in zip(lines, holdout_losses(states), strict=True):
            line["holdout_loss"] = loss
    for line in lines:
        if not np.isfinite(list(line.values())).all():
            raise InputError(
                f"training diverged in epoch {epoch} (loss {line['loss']}): in a new --workdir, "
                "lower --config.train.learning_rate or set --config.train.clip=1.0"
            )
    return lines


def at_once(config, features: TrainingFeatures) -> int:
    """How many runs may share a program: it takes all features at hand, the same for all runs.

    By default as many as there are where devices hold the features, and one where not: vmapped
    convolutions are slow on CPUs.
    """
    if features.cached is None:
        return 1
    return config.train.seeds_at_once or (sys.maxsize if features.on_device else 1)


def train_in(
    folder: pathlib.Path,
    config,
    objective: Objective,
    features: TrainingFeatures,
    holdout: Features | None,
    holdout_valid: np.ndarray | None = None,
    *,
    seed: int,
    beside: Sequence[tuple[int, pathlib.Path]] = (),
    on_epoch: Callable[[int, dict, int], dict] = lambda epoch, variables, seed: {},
    progress: str = "train",
) -> dict:
    """`train` with its `checkpoints/` and `metrics.jsonl` in a folder; returns the variables.

    `beside` are seeds and folders of trainings that differ from this one in nothing else. As many
    of them as `at_once` allows, and as stand where this one does, are trained in the same program,
    to the same end: in their own turn they are found finished. `on_epoch` gets, of each training,
    the number of the epoch, the variables after it and the seed.
    """

    def opened(seed: int, folder: pathlib.Path) -> Run:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        return Run(seed, checkpoints, folder / "metrics.jsonl")

    with contextlib.ExitStack() as stack:
        runs = [opened(seed, folder)]
        for other in beside if at_once(config, features) > 1 else ():
            run = opened(*other)
            if run.checkpoints.latest == runs[0].checkpoints.latest:
                runs.append(run)
        state = train(
            config,
            objective,
            features,
            holdout,
            holdout_valid,
            runs=runs[: at_once(config, features)],
            on_epoch=lambda epoch, state, seed: on_epoch(epoch, state.variables, seed),
            progress=progress,
        )
    return state.variables


def trained_in(folder: pathlib.Path, config, objective: Objective, shapes) -> dict:
    """The variables that `train_in` left in a folder; `shapes` are (h, w, C) of each scale."""
    # Of any number of steps: they are no part of the state.
    fresh = partial(create_state, objective, create_optimizer(config.train, 1000), shapes, 0)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(checkpoints.latest, jax.eval_shape(fresh)).variables


def _epoch_runner(config, objective, optimizer, features, seeds):
    """`(states, epoch, batches)` -> an iterator of states, each step or once an epoch.

    States and batches are lists, a run each. One program runs a whole epoch, of one run or several,
    where the devices hold the features; but not on CPUs, where convolutions in a loop are ten times
    slower.
    """
    n = len(seeds)
    programs = _programs(objective.loss, optimizer, config.parallel, n)
    seeds = np.array(seeds, np.uint32)
    if features.on_device or n > 1:
        kept = jax.tree.map(np.asarray, (features.cached, features.valid))
        on_devices = parallel.on_devices(kept)

        def run(states, epoch, batches):
            begin = _together(states), seeds if n > 1 else seeds[0]
            try:
                after = programs.epoch(begin, on_devices, *_together(batches))
                states = jax.block_until_ready(_apart(after, n))
            except jax.errors.JaxRuntimeError as error:
                if n == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise InputError(
                    f"the devices have no room for {n} seeds at once: go on with fewer, "
                    f"--config.train.seeds_at_once={n // 2}"
                ) from error
            yield states

        return run

    def run(states, epoch, batches):
        ((state,), ((index, weight),)) = states, batches
        stream = zip(features.stream(epoch, index), index, weight, strict=True)
        batch = next(stream, None)
        while batch is not None:
            maps, rows, row_weight = batch
            valid = None if features.valid is None else features.valid[rows]
            state = programs.step((state, seeds[0]), (maps, valid), rows, row_weight)
            batch = next(stream, None)  # read while the devices are at work
            yield [state]

    return run


def _holdout_losses(config, objective, holdout, valid, n):
    """States of n runs -> of each, `objective.validation` of the held-out images, their mean."""
    if holdout is None:
        return None

    size = config.batch_size
    run = _validation(objective.validation, config.parallel, size, n)

    def means(states):
        variables = _together([state.variables for state in states])
        losses = in_batches(partial(run, variables), (holdout, valid), size)
        return losses.mean(0, dtype=np.float64).reshape(n).tolist()

    return means


# One tree for several runs has an axis of them in front; of a single run it is left as it is.


def _together(trees: Sequence) -> Any:
    return _stacked(trees) if len(trees) > 1 else trees[0]


def _apart(tree: Any, n: int) -> list:
    return _unstacked(tree, n) if n > 1 else [tree]


@jax.jit
def _stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, static_argnums=1)
def _unstacked(tree, n):
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(n)]


# What is compiled serves all seeds and categories of a run that train alike: it is kept by what it
# hangs on, and a seed is one of its arguments.
_kept = functools.lru_cache(maxsize=8)


def once_a_configuration(function: Callable) -> Callable:
    """`function(config)`, called once for equal configurations: see `_kept`."""
    kept = _kept(function)
    return functools.wraps(function)(lambda config: kept(FrozenConfigDict(config)))


class _Programs(NamedTuple):
    """`train_step` and `train_epoch` with ((state, seed), ...) for arguments."""

    step: Callable  # of one run
    epoch: Callable  # of n, see `_together`


@_kept
def _programs(
    loss: Callable, optimizer: optax.GradientTransformation, kind: str, n: int
) -> _Programs:
    def step(begin, images, rows, weight, axis_name):
        state, seed = begin
        bound = {"loss": loss, "optimizer": optimizer, "seed": seed, "axis_name": axis_name}
        return train_step(state, images, rows, weight, **bound)

    def epoch(begin, cache, index, weight, axis_name):
        state, seed = begin
        bound = partial(train_step, loss=loss, optimizer=optimizer, seed=seed)
        return train_epoch(state, cache, index, weight, step=bound, axis_name=axis_name)

    def epochs(begin, cache, index, weight, axis_name):
        each = partial(epoch, axis_name=axis_name)
        return jax.vmap(each, in_axes=(0, None, 0, 0))(begin, cache, index, weight)

    whole = parallel.epoch(epoch, kind) if n == 1 else parallel.epochs(epochs, kind, n)
    return _Programs(parallel.step(step, kind), whole)


@_kept
def _validation(validation: Callable, kind: str, size: int, n: int) -> Callable:
    def run(variables, images):
        return validation(variables, *images)

    # The images come first in what is computed.
    runs = run if n == 1 else jax.vmap(run, in_axes=(0, None), out_axes=1)
    return parallel.per_example(runs, kind, size)


@_kept
def _optimizer(config: FrozenConfigDict, steps: int) -> optax.GradientTransformation:
    return create_optimizer(config, steps)


def _keep_epochs(file: pathlib.Path, epochs: int) -> None:
    """Drop the lines of epochs that a killed process wrote but did not save."""
    if not parallel.is_main() or not file.exists():
        return
    kept = [line for line in read_lines(file) if line["epoch"] <= epochs]
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
