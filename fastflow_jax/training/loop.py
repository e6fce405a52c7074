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
from fastflow_jax.errors import InputError, Interrupted
from fastflow_jax.features.extract import TrainingFeatures, in_batches
from fastflow_jax.files import read_lines, synchronise, write_text
from fastflow_jax.training.checkpoints import Checkpoints
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.step import (
    Objective,
    TrainState,
    create_optimizer,
    create_state,
    epoch_order,
    train_epoch,
    train_step,
)

# Fields of the configuration that `train` and the optimiser read.
READS = (
    *("checkpoint_every", "evaluate_every"),
    *("train.steps", "train.max_epochs", "train.epochs", "train.batch_size", "train.drop_last"),
    *("train.optimizer", "train.beta2", "train.learning_rate", "train.schedule", "train.warmup"),
    *("train.weight_decay", "train.clip", "train.seeds_at_once", "train.cache"),
)


class Run(NamedTuple):
    """One seed of a training, with its files."""

    seed: int  # of the parameters, the order of images and the random keys of the loss
    checkpoints: Checkpoints
    metrics_file: pathlib.Path  # JSON lines, one per epoch


@contextlib.contextmanager
def signals_set_a_flag() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and SIGINT are appended; a second signal acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handler(signum, frame):
        received.append(signum)
        for number, old in previous.items():
            signal.signal(number, old)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, which alone can handle signals
        pass
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def signalled(received: list[int]) -> int:
    """A signal that any process has received, or 0; the same in all processes."""
    return parallel.any_process(received[0] if received else 0)


def train(
    context: FitContext,
    objective: Objective,
    runs: Sequence[Run],
    on_epoch: Callable[[int, TrainState, int], dict] = lambda epoch, state, seed: {},
) -> list[TrainState]:
    """Trains from the latest checkpoints to the last epoch of the configuration.

    Args:
      context: of the first run.
      objective: the loss to minimise.
      runs: one run, or up to `at_once` runs that are trained in one program. Their latest
        checkpoints must be of the same step, or none of them has one.
      on_epoch: called after each epoch of each run with its number, from 1 on, the state and the
        run's seed. Its result is added to the epoch's line of metrics.

    Returns:
      The final states of the runs.

    Raises:
      Interrupted: SIGTERM or SIGINT was received; the states are saved.
      InputError: a loss is not finite, or the devices have too little memory for the runs.
    """
    training = _Training(context, objective, runs)
    first, position = divmod(runs[0].checkpoints.latest or 0, training.steps)
    states = [training.initial_state(run) for run in runs]
    if first == training.epochs:
        return states
    for run in runs:
        _keep_epochs(run.metrics_file, first)
    with training.progress_bar(first, position) as bar, signals_set_a_flag() as received:
        for epoch in range(first, training.epochs):
            start = time.perf_counter()
            for done, after in training.steps_of_epoch(states, epoch, position):
                states = after
                bar.update(done - position)
                position = done
                signum = signalled(received)
                if signum and position < training.steps:
                    training.save(states)
                    at = epoch + position / training.steps
                    raise Interrupted(signum, f"at epoch {at:.1f}; saved")
            position = 0
            lines = training.finish_epoch(states, epoch + 1, start, on_epoch)
            losses = ", ".join(f"{line['loss']:.4g}" for line in lines)
            bar.set_postfix_str(f"epoch {epoch + 1}/{training.epochs}, loss {losses}", False)
            last = epoch + 1 == training.epochs
            signum = signalled(received)
            if last or signum or (epoch + 1) % context.config.checkpoint_every == 0:
                training.save(states)
                signum = signalled(received)  # or during the saving
            if signum:
                raise Interrupted(signum, f"at epoch {epoch + 1:.1f}; saved")
    return states


class _Training:
    """The order of batches, programs, checkpoints and metrics of the runs of `train`."""

    def __init__(self, context: FitContext, objective: Objective, runs: Sequence[Run]):
        c, features = context.config.train, context.train
        self._context, self._objective, self._runs = context, objective, runs
        self._order = partial(
            epoch_order,
            features.n,
            c.batch_size,
            drop_last=c.drop_last,
            multiple=parallel.n_devices(),
        )
        self.steps = len(self._order(seed=0, epoch=0)[0])  # per epoch
        self.epochs = c.epochs
        if self.epochs is None:
            self.epochs = min(c.max_epochs, max(1, round(c.steps / self.steps)))
        self._optimizer = _optimizer(FrozenConfigDict(c), self.epochs * self.steps)

    @functools.cached_property
    def _run_epoch(self) -> Callable:
        seeds = [run.seed for run in self._runs]
        context = self._context
        return _epoch_runner(context.config, self._objective, self._optimizer, context.train, seeds)

    @functools.cached_property
    def _mean_losses(self) -> Callable | None:
        return _holdout_losses(self._context, self._objective, len(self._runs))

    def initial_state(self, run: Run) -> TrainState:
        """The state of the latest checkpoint, or a new one."""
        shapes = self._context.train.shapes
        fresh = partial(create_state, self._objective, self._optimizer, shapes, run.seed)
        latest = run.checkpoints.latest
        return fresh() if latest is None else run.checkpoints.restore(latest, jax.eval_shape(fresh))

    def progress_bar(self, epoch: int, step: int) -> tqdm:
        """A progress bar over the steps of all epochs, at a step of an epoch."""
        n, label = len(self._runs), self._context.label
        return tqdm(
            total=self.epochs * self.steps,
            initial=epoch * self.steps + step,
            desc=label if n == 1 else f"{label}, {n} seeds",
            unit="step",
            dynamic_ncols=True,
        )

    def steps_of_epoch(
        self, states: list[TrainState], epoch: int, position: int
    ) -> Iterator[tuple[int, list[TrainState]]]:
        """Yields the number of steps done in this epoch, and the states after them."""
        orders = [self._order(seed=run.seed, epoch=epoch) for run in self._runs]
        batches = [tuple(parallel.columns(a)[position:] for a in each) for each in orders]
        if position == 0:
            zero = jnp.zeros(())
            states = [s.replace(epoch_loss=zero, epoch_images=zero) for s in states]
        for after in self._run_epoch(states, epoch, batches):
            yield int(after[0].step) - epoch * self.steps, after

    def finish_epoch(
        self, states: Sequence[TrainState], epoch: int, start: float, on_epoch: Callable
    ) -> list[dict[str, Any]]:
        """Appends the epoch's line to the metrics of each run, and returns these lines."""
        lines = _lines(epoch, states, self._mean_losses)
        seconds = round((time.perf_counter() - start) / len(states), 3)  # the share of each
        for run, state, line in zip(self._runs, states, lines, strict=True):
            line["seconds"] = seconds
            line |= on_epoch(epoch, state, run.seed)
            # The line is on the disk before its checkpoint, so that no saved epoch lacks one.
            if parallel.is_main():
                with run.metrics_file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                synchronise(run.metrics_file)
        return lines

    def save(self, states: Sequence[TrainState]) -> None:
        """Saves a checkpoint of each run."""
        for run, state in zip(self._runs, states, strict=True):
            run.checkpoints.save(int(state.step), state)
            if len(self._runs) > 1 and parallel.n_processes() > 1:
                run.checkpoints.wait()  # Orbax has one barrier for all writes


def _lines(
    epoch: int, states: Sequence[TrainState], mean_losses: Callable | None
) -> list[dict[str, Any]]:
    """The metrics of an epoch, one dictionary per run.

    Raises:
      InputError: a loss is not finite.
    """
    lines: list[dict[str, Any]] = [
        {"epoch": epoch, "step": int(s.step), "loss": float(s.epoch_loss / s.epoch_images)}
        for s in states
    ]
    if mean_losses is not None:
        for line, loss in zip(lines, mean_losses(states), strict=True):
            line["holdout_loss"] = loss
    for line in lines:
        if not np.isfinite(list(line.values())).all():
            raise InputError(
                f"Training diverged in epoch {epoch} (loss {line['loss']}). In a new --workdir, "
                "lower --config.train.learning_rate or set --config.train.clip=1.0."
            )
    return lines


def at_once(config, features: TrainingFeatures) -> int:
    """Largest number of runs that are trained in one program, which needs all features in memory.

    By default it is unlimited if the features are in device memory, and otherwise 1, because
    vmapped convolutions are slow on CPUs.
    """
    if features.cached is None:
        return 1
    return config.train.seeds_at_once or (sys.maxsize if features.on_device else 1)


def train_variables(
    context: FitContext, objective: Objective, make_scorer: Callable[[dict, int], Any]
) -> dict:
    """Trains in the directory of a context.

    Sibling runs with a latest checkpoint of the same step are trained in the same program, up to
    `at_once` runs.

    Args:
      context: of the training.
      objective: the loss to minimise.
      make_scorer: (variables, seed) -> scorer, for `context.on_epoch`.

    Returns:
      The variables of `objective` after the training.

    Raises:
      Interrupted, InputError: see `train`.
    """

    def opened(seed: int, directory: pathlib.Path) -> Run:
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", continues=True))
        return Run(seed, checkpoints, directory / "metrics.jsonl")

    def on_epoch(epoch: int, state: TrainState, seed: int) -> dict:
        return context.on_epoch(epoch, lambda: make_scorer(state.variables, seed))

    start = context.start
    if start is not None:
        objective = objective._replace(init=lambda key, features: start)
    n = at_once(context.config, context.train)
    with contextlib.ExitStack() as stack:
        runs = [opened(context.seed, context.directory)]
        for sibling in context.sibling_runs if n > 1 else ():
            run = opened(*sibling)
            if run.checkpoints.latest == runs[0].checkpoints.latest:
                runs.append(run)
        return train(context, objective, runs[:n], on_epoch)[0].variables


def read_variables(directory: pathlib.Path) -> dict:
    """Reads the variables that `train_variables` has saved in the directory of a training."""
    with Checkpoints(directory / "checkpoints") as checkpoints:
        found = checkpoints.restore_fields("params", "constants")
    return {"params": found["params"], **found.get("constants", {})}


def _epoch_runner(config, objective, optimizer, features, seeds) -> Callable:
    """Returns a function (states, epoch, batches) -> iterator of states, per step or per epoch.

    States and batches are lists with an entry per run. If the features are in device memory, or
    there are several runs, one program runs an epoch of all runs. Otherwise it runs a step:
    convolutions in a loop are ten times slower on CPUs.
    """
    n = len(seeds)
    programs = _programs(objective.loss, optimizer, config.parallel, n)
    seeds = np.array(seeds, np.uint32)
    if features.on_device or n > 1:
        return _whole_epochs(programs.epoch, features, seeds)

    def run(states, epoch, batches):
        ((state,), ((index, weight),)) = states, batches
        stream = zip(features.stream(epoch, index), index, weight, strict=True)
        batch = next(stream, None)
        while batch is not None:
            maps, rows, row_weight = batch
            valid = None if features.valid is None else features.valid[rows]
            state = programs.step((state, seeds[0]), (maps, valid), rows, row_weight)
            batch = next(stream, None)  # read while the devices compute
            yield [state]

    return run


def _whole_epochs(program: Callable, features: TrainingFeatures, seeds: np.ndarray) -> Callable:
    """Returns an epoch runner, see `_epoch_runner`, with a program per epoch."""
    n = len(seeds)
    on_devices = parallel.on_devices(jax.tree.map(np.asarray, (features.cached, features.valid)))

    def run(states, epoch, batches):
        begin = _together(states), seeds if n > 1 else seeds[0]
        try:
            after = program(begin, on_devices, *_together(batches))
            states = jax.block_until_ready(_apart(after, n))
        except jax.errors.JaxRuntimeError as error:
            if n == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"The devices have too little memory for {n} seeds at once. Continue with fewer: "
                f"--config.train.seeds_at_once={n // 2}."
            ) from error
        yield states

    return run


def _holdout_losses(context: FitContext, objective: Objective, n: int) -> Callable | None:
    """Returns a function from the states of n runs to their mean losses on held-out images."""
    if context.holdout is None:
        return None
    held_out, size = (context.holdout, context.holdout_valid), context.config.batch_size
    run = _validation(objective.validation, context.config.parallel, size, n)

    def means(states):
        variables = _together([state.variables for state in states])
        losses = in_batches(partial(run, variables), held_out, size)
        return losses.mean(0, dtype=np.float64).reshape(n).tolist()

    return means


# Trees of several runs are stacked along a new first axis. The tree of a single run is unchanged.


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


def cached_by_config(function: Callable) -> Callable:
    """Decorator that caches `function(config)` by the values of the configuration."""
    cached = parallel.cached_program(function)
    return functools.wraps(function)(lambda config: cached(FrozenConfigDict(config)))


class _Programs(NamedTuple):
    """Compiled `train_step` and `train_epoch`, which take (state, seed) for a state."""

    step: Callable  # of one run
    epoch: Callable  # of n runs, see `_together`


@parallel.cached_program
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


@parallel.cached_program
def _validation(validation: Callable, kind: str, size: int, n: int) -> Callable:
    def run(variables, images):
        return validation(variables, *images)

    # The first axis of the result is the one over images.
    runs = run if n == 1 else jax.vmap(run, in_axes=(0, None), out_axes=1)
    return parallel.per_example(runs, kind, size)


@parallel.cached_program
def _optimizer(config: FrozenConfigDict, steps: int) -> optax.GradientTransformation:
    return create_optimizer(config, steps)


def _keep_epochs(file: pathlib.Path, epochs: int) -> None:
    """Removes lines of epochs after the last checkpoint, which a killed process has written."""
    if not parallel.is_main() or not file.exists():
        return
    kept = [line for line in read_lines(file) if line["epoch"] <= epochs]
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
