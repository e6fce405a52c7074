"""Orbax checkpoints of a run: the latest, to resume from, and the best by held-out loss."""

import atexit
import contextlib
import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.files import is_utf8, make_folder, remedy

_policies = ocp.training.preservation_policies
_WILDCARDS = "*?[\\"
_BUCKETS = ("gs", "s3", "az", "hf")  # etils takes /gs/... for gs://...


class Checkpoints:
    """The checkpoints of one run folder; use it as a context manager.

    A checkpoint is written in the background and appears under its name only when it is whole, so
    that a process may die at any moment. Several processes write it together, into a folder that
    all of them see.

    After every save, the structure of what was written is read back: at the next save, at `wait`,
    or at the end of the context.

    Raises:
      InputError: the folder holds a damaged one, or what was written cannot be read back.
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
        self._directory = directory.absolute()
        self._written: tuple[int, int] | None = None  # step and leaves of a save, until checked
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(_literal_path(self._directory))
            with _damage_is_named(self._directory):
                self._orbax = ocp.training.Checkpointer(
                    path, preservation_policy=keep, cleanup_tmp_directories=True
                )
            self._link = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if parallel.is_lost(error):  # writing takes all processes
            return
        with self._link, self._full_disk_is_named():
            try:
                self.wait()
            finally:
                self._orbax.close()

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
        self.wait()
        with self._full_disk_is_named():
            self._orbax.save_async(step, parallel.to_all(state), metrics=metrics, force=True)
        self._written = step, len(jax.tree.leaves(state))

    def wait(self) -> None:
        """Return once all that was saved is written, and was found readable."""
        with self._full_disk_is_named():
            self._orbax.wait()
        written, self._written = self._written, None
        if written is not None:
            parallel.on_main(lambda: self._check(*written))

    def _check(self, step: int, n_leaves: int) -> None:
        """Raises InputError unless the metadata of a checkpoint lists all arrays of its state."""
        try:
            self._check_manifest(step)
            n = len(jax.tree.leaves(self._orbax.metadata(step).metadata))
            if n != n_leaves:
                raise ValueError(f"{n} of {n_leaves} arrays were found")
        except Exception as error:  # of whatever part of Orbax met it first
            raise InputError(
                f"{self._directory / str(step)} was written but cannot be read back "
                f"({_first_line(error)}). Check the file system, or choose another --workdir."
            ) from error

    def _check_manifest(self, step: int) -> None:
        """Raises FileNotFoundError where Orbax, which would go on, has not merged its files."""
        if not any((self._directory / str(step)).glob("*/manifest.ocdbt")):
            raise FileNotFoundError("manifest.ocdbt is missing")

    @contextlib.contextmanager
    def _full_disk_is_named(self):
        try:
            yield
        except Exception as error:  # of whatever library met it first
            if "No space left on device" not in str(error):
                raise
            raise InputError(
                f"no space left to write {self._directory}: make room, and the same command "
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
        with _damage_is_named(self._directory):
            if step is None:
                raise ValueError("it is empty")
            self._check_manifest(step)
            return parallel.to_own(self._orbax.load(step, abstract))


@contextlib.contextmanager
def _damage_is_named(directory: pathlib.Path):
    try:
        yield
    except Exception as error:  # of whatever part of Orbax met it first
        if parallel.is_lost(error) or remedy(error):
            raise
        raise InputError(
            f"{directory} cannot be read ({_first_line(error)}): bring it back, or train anew in "
            "another folder"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _literal_path(directory: pathlib.Path):
    r"""A path of a directory that Orbax reads as it is written.

    Orbax takes brackets and other wildcards in a path for a pattern, and finds nothing to merge;
    TensorStore writes to `a/b` for `a\b` and takes UTF-8 only; etils takes `/gs/...` for a bucket.
    A directory of such a path is reached by a symbolic link in a temporary directory. All processes
    of a run use the same path, as Orbax requires.

    Raises:
      InputError: there is no temporary directory for the link.
    """
    if _is_literal(directory):
        yield directory
        return
    parallel.on_main(lambda: make_folder(directory))
    folder = parallel.on_main(lambda: _make_private_folder(directory))
    link = pathlib.Path(folder, "checkpoints")
    link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # on the hosts of other processes
    with contextlib.suppress(FileExistsError):  # another process on this host was faster
        link.symlink_to(directory)
    remove = functools.partial(shutil.rmtree, link.parent, ignore_errors=True)
    if parallel.n_processes() > 1:  # others on this host may still need it
        atexit.register(remove)
        yield link
        return
    try:
        yield link
    finally:
        remove()


def _is_literal(path: pathlib.Path) -> bool:
    root = path.parts[1] if len(path.parts) > 1 else ""
    return is_utf8(path) and root not in _BUCKETS and not set(_WILDCARDS) & set(str(path))


def _make_private_folder(directory: pathlib.Path) -> str:
    """Makes an empty folder of a literal path, for a link to `directory`."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        with contextlib.suppress(OSError):
            if _is_literal(pathlib.Path(parent).absolute()):
                return tempfile.mkdtemp(prefix="fastflow_jax_", dir=parent)
    raise InputError(
        f"{directory} has a character in its path that Orbax cannot write under (one of * ? [ \\, "
        "or one that is not UTF-8), and there is no temporary directory for a link to it. Choose "
        "another --workdir, or set TMPDIR to a directory without such characters."
    )
