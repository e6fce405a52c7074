"""Orbax checkpoints of a run: the latest, to resume from, and the best by held-out loss."""

import contextlib
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.paths import remedy

_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one run folder; use it as a context manager.

    A checkpoint is written in the background and appears under its name only when it is whole, so
    that a process may die at any moment. Several processes write it together, into a folder that
    all of them see.

    Raises:
      InputError: the folder holds a damaged one.
    """

    def __init__(self, directory: pathlib.Path):
        # Two rules joined: with the best one alone, a resumed run would start from there.
        keep = _policies.AnyPreservationPolicy(
            [
                _policies.LatestN(1),
                _policies.BestN(
                    get_metric_fn=lambda metrics: metrics["holdout_loss"],
                    reverse=True,  # the lower, the better
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        directory = directory.absolute()
        with _damage_is_named(directory):
            self._orbax = ocp.training.Checkpointer(
                directory, preservation_policy=keep, cleanup_tmp_directories=True
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if parallel.is_lost(error):  # writing takes all processes
            return
        with self._full_disk_is_named():
            self._orbax.close()  # waits for what is being written

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss, where there are held-out images."""
        judged = [c for c in self._orbax.checkpoints if c.metrics]
        return min(judged, key=lambda c: c.metrics["holdout_loss"]).step if judged else None

    def save(self, step: int, state: Any, holdout_loss: float | None = None) -> None:
        """Start writing `state`; returns once it is copied off the devices."""
        if step == self.latest:
            return
        metrics = None if holdout_loss is None else {"holdout_loss": holdout_loss}
        with self._full_disk_is_named():
            self._orbax.save_async(step, parallel.to_all(state), metrics=metrics, force=True)

    def wait(self) -> None:
        """Return once all that was saved is written."""
        with self._full_disk_is_named():
            self._orbax.wait()

    @contextlib.contextmanager
    def _full_disk_is_named(self):
        try:
            yield
        except Exception as error:  # of whatever library met it first
            if "No space left on device" not in str(error):
                raise
            raise InputError(
                f"no space left to write {self._orbax.directory}: make room, and the same command "
                "goes on from the checkpoint before"
            ) from error

    def restore(self, step: int | None, template: Any) -> Any:
        """Read a checkpoint onto the default device of each process, whatever devices wrote it.

        Args:
          step: `latest` or `best`.
          template: a state of the same structure, shapes and types (arrays or ShapeDtypeStructs).

        Raises:
          InputError: there is no such checkpoint, it is damaged, or it holds something else.
        """
        sharding = parallel.of_all()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), template
        )
        with _damage_is_named(self._orbax.directory):
            if step is None:
                raise ValueError("it is empty")
            return parallel.to_own(self._orbax.load(step, abstract))


@contextlib.contextmanager
def _damage_is_named(directory: pathlib.Path):
    try:
        yield
    except Exception as error:  # of whatever part of Orbax met it first
        if parallel.is_lost(error) or remedy(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{directory} cannot be read ({reason:.200}): bring it back, or train anew in another "
            "folder"
        ) from error
