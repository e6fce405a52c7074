"""What a training step is: pure functions of a state and a batch, and the order of the batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastflow_jax import parallel
from fastflow_jax.features.extract import Features


class Objective(NamedTuple):
    """All that training has to know of what it trains: pure functions.

    Features are [B, h, w, C] a scale; `valid` is bool [B, H, W], False in padding, or None.
    """

    # (key, features of one image, zeros) -> the variables: "params", and collections that are
    # saved with them and never trained
    init: Callable[[jax.Array, Features], dict]
    # (variables, features, valid, keys [B]) -> what is to become small, [B]
    loss: Callable[..., jax.Array]
    # (variables, features, valid) -> of images held out, [B]; the lower, the better
    validation: Callable[..., jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that training changes, and the numbers that a model needs but never trains."""

    step: jax.Array  # int32
    params: Any
    constants: Any  # collections such as "permutations" and "statistics"
    optimizer: Any
    epoch_loss: jax.Array  # sum over the images of this epoch so far
    epoch_images: jax.Array

    @property
    def variables(self) -> dict:
        """What the functions of an `Objective` take."""
        return {"params": self.params, **self.constants}


def create_optimizer(config, steps: int) -> optax.GradientTransformation:
    """The optimiser of `config.train` for a run of `steps` steps.

    Weight decay is added to the gradient before Adam's scaling, as torch's Adam does (L2, not
    AdamW): the reference's recipe.
    """
    warmup = min(round(config.warmup * steps), max(steps, 1) - 1)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, 1))
    else:
        rate = optax.linear_schedule(0.0, config.learning_rate, warmup)
        rate = rate if warmup else optax.constant_schedule(config.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_adam(b2=config.beta2) if config.optimizer == "adam" else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )


def create_state(
    objective: Objective, optimizer: optax.GradientTransformation, shapes, seed: int
) -> TrainState:
    """A fresh state.

    Args:
      objective: what is trained.
      optimizer: see `create_optimizer`.
      shapes: (h, w, C) of each scale.
      seed: of all that `objective.init` draws.
    """
    features = tuple(np.zeros((1, *shape), np.float32) for shape in shapes)
    constants = dict(objective.init(jax.random.key(seed), features))
    params = constants.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants=jax.tree.map(jnp.asarray, constants),
        optimizer=jax.jit(optimizer.init)(params),
        epoch_loss=jnp.zeros(()),
        epoch_images=jnp.zeros(()),
    )


def train_step(
    state: TrainState,
    images: tuple[Features, jax.Array | None],
    rows: jax.Array,
    weight: jax.Array,
    *,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
    axis_name: str | None = None,
) -> TrainState:
    """One step on the loss, averaged over the global batch.

    Args:
      state: before the step.
      images: features [B, h, w, C] a scale, and `valid` as in `Objective`.
      rows: int32 [B], which images these are; with the seed and the step they make the keys that
        the loss draws from, so that it draws the same however many devices share the batch.
      weight: [B]; 0 leaves an example of padding out.
      loss: see `Objective`.
      optimizer: see `create_optimizer`.
      seed: of the keys.
      axis_name: the named axis that the batch is split over, if any.
    """
    total_weight = parallel.total(weight.sum(), axis_name)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)

    def mean_loss(params):
        losses = loss({"params": params, **state.constants}, *images, keys)  # [B]
        return jnp.sum(weight * losses) / total_weight

    # The sum over devices is taken of the gradient, not inside the differentiated function.
    value, grads = parallel.total(jax.value_and_grad(mean_loss)(state.params), axis_name)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
        epoch_loss=state.epoch_loss + value * total_weight,
        epoch_images=state.epoch_images + total_weight,
    )


def epoch_order(
    n: int, batch_size: int, *, seed: int, epoch: int, drop_last: bool, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """The batches of one epoch: a function of seed and epoch alone, so that resuming is exact.

    Returns:
      Indices of images and their weights, both [steps, B], where B is `batch_size` rounded up to
      `multiple`; weight 0 pads what n does not fill. With `drop_last` the short last batch is left
      out, unless it is the only one.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n)
    steps = n // batch_size if drop_last and n >= batch_size else -(-n // batch_size)
    order = order[: steps * batch_size]
    width = -(-batch_size // multiple) * multiple
    index = np.zeros((steps, width), np.int32)
    weight = np.zeros((steps, width), np.float32)
    for row in range(steps):
        batch = order[row * batch_size : (row + 1) * batch_size]
        index[row, : len(batch)] = batch
        weight[row, : len(batch)] = 1.0
    return index, weight


def train_epoch(
    state: TrainState,
    cache: tuple[Features, jax.Array | None],
    index: jax.Array,
    weight: jax.Array,
    *,
    step: Callable,
    axis_name: str | None = None,
) -> TrainState:
    """All steps of one epoch in one program, for devices that hold the whole feature cache.

    Args:
      state: before the epoch.
      cache: features of all images, [N, h, w, C] a scale, and `valid` as in `Objective`.
      index: [steps, B], into the cache.
      weight: [steps, B].
      step: `train_step` with everything but state, images, rows, weight and axis bound.
      axis_name: see `train_step`.
    """

    def body(state, batch):
        rows, weight = batch
        images = jax.tree.map(lambda array: jnp.take(array, rows, axis=0), cache)
        return step(state, images, rows, weight, axis_name=axis_name), None

    return jax.lax.scan(body, state, (index, weight))[0]
