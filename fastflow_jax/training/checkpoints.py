"""Orbax checkpoints of a run; only the latest one is kept, once it is on the disk."""

import atexit
import contextlib
import functools
import json
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.files import is_utf8, make_folder, remedy, synchronise

_log = logging.getLogger(__name__)
_WILDCARDS = "*?[\\"
_BUCKETS = ("gs", "s3", "az", "hf")  # etils takes /gs/... for gs://...


class Checkpoints:
    """The checkpoints of one run directory, as a context manager.

    A checkpoint is written in the background and appears under its name only when it is complete,
    so that the process may be killed at any moment. Several processes write it together, into a
    directory that all of them see. After every save, the structure of the checkpoint is read back
    and its files are synchronised to the disk: at the next save, at `wait`, or at the end of the
    context. Only then is the earlier checkpoint deleted.

    Args:
      directory: of the checkpoints.
      continues: whether a training continues from them. Checkpoints whose files a power failure has
        cut off are then deleted, with a warning.

    Raises:
      InputError: a checkpoint in the directory is damaged, or cannot be read back.
    """

    def __init__(self, directory: pathlib.Path, *, continues: bool = False):
        self._directory = directory.absolute()
        if continues:
            parallel.on_main(self._delete_incomplete)
        self._written: tuple[int, int] | None = None  # step and leaves of a save, until checked
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(_literal_path(self._directory))
            with _damage_is_named(self._directory):
                self._orbax = ocp.training.Checkpointer(
                    str(path),
                    cleanup_tmp_directories=True,
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
        """Step of the latest checkpoint, or None if there is none."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`; returns when it is copied off the devices."""
        if step == self.latest:
            return
        self.wait()
        with self._full_disk_is_named():
            self._orbax.save_async(step, parallel.to_all(state), force=True)
        self._written = step, len(jax.tree.leaves(state))

    def wait(self) -> None:
        """Returns when every saved checkpoint is written and was found readable."""
        with self._full_disk_is_named():
            self._orbax.wait()
        written, self._written = self._written, None
        if written is not None:
            parallel.on_main(lambda: self._check(*written))
            parallel.on_main(lambda: synchronise(self._directory))
            self._keep_latest()

    def _keep_latest(self) -> None:
        """Deletes all checkpoints but the latest one."""
        latest = self.latest

        def delete() -> None:
            for step in _steps(self._directory):
                if step != latest:
                    shutil.rmtree(self._directory / str(step))

        if len(self._orbax.checkpoints) > 1:
            parallel.on_main(delete)
            self._orbax.reload()

    def _delete_incomplete(self) -> None:
        """Deletes checkpoints with empty or truncated files, the latest first."""
        for step in reversed(_steps(self._directory)):
            folder = self._directory / str(step)
            if _is_complete(folder):
                return
            _log.warning(
                "%s is incomplete, as after a power failure. It is deleted, and the training "
                "continues from the checkpoint before, if any.",
                folder,
            )
            shutil.rmtree(folder)

    def _check(self, step: int, n_leaves: int) -> None:
        """Raises InputError unless the metadata of a checkpoint lists all arrays of its state."""
        try:
            self._check_manifest(step)
            n = len(jax.tree.leaves(self._orbax.metadata(step).metadata))
            if n != n_leaves:
                raise ValueError(f"{n} of {n_leaves} arrays were found")
        except Exception as error:  # any part of Orbax may raise
            raise InputError(
                f"{self._directory / str(step)} was written but cannot be read back "
                f"({_first_line(error)}). Check the file system, or choose another --workdir."
            ) from error

    def _check_manifest(self, step: int) -> None:
        """Raises FileNotFoundError if Orbax has not merged the files of a checkpoint."""
        if not any((self._directory / str(step)).glob("*/manifest.ocdbt")):
            raise FileNotFoundError("manifest.ocdbt is missing")

    @contextlib.contextmanager
    def _full_disk_is_named(self):
        try:
            yield
        except Exception as error:  # any library may raise
            if "No space left on device" not in str(error):
                raise
            raise InputError(
                f"No space is left to write {self._directory}. Free some space; the same command "
                "then continues from the previous checkpoint."
            ) from error

    def restore(self, step: int | None, template: Any) -> Any:
        """Reads a checkpoint onto the default device of each process, whatever devices wrote it.

        Args:
          step: `latest`.
          template: a tree of the same structure, shapes and types (arrays or ShapeDtypeStructs).

        Raises:
          InputError: there is no checkpoint, it is damaged, or its structure is another.
        """
        return self._restore(step, lambda step: template, partial=False)

    def restore_fields(self, *fields: str) -> dict[str, Any]:
        """Reads some fields of the state in the latest checkpoint, like `restore`.

        Fields that the state does not have are left out.
        """

        def shapes(step: int) -> dict[str, Any]:
            tree: Any = self._orbax.metadata(step).metadata
            return {field: tree[field] for field in fields if field in tree}

        return self._restore(self.latest, shapes, partial=True)

    def _restore(self, step: int | None, template: Callable[[int], Any], *, partial: bool) -> Any:
        """Reads the arrays of `template(step)`; `partial` if the state may have other fields."""
        sharding = parallel.of_all()
        with _damage_is_named(self._directory):
            if step is None:
                raise ValueError("it is empty")
            self._check_manifest(step)
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                template(step),
            )
            context = ocp.Context()
            context.pytree.loading.partial_load = partial
            with context:
                return parallel.to_own(self._orbax.load(step, abstract))


def _steps(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a directory, in order."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _is_complete(folder: pathlib.Path) -> bool:
    """Whether no file of a checkpoint is empty or truncated, as far as the files say themselves."""
    texts = [*folder.glob("_*"), *folder.glob("*/_*"), *folder.glob("*/array_metadatas/*")]
    try:
        for file in texts:
            json.loads(file.read_bytes())
    except ValueError:
        return False
    files = [path for path in folder.rglob("*") if path.is_file()]
    has_manifest = any(folder.glob("*/manifest.ocdbt"))
    return bool(texts) and has_manifest and all(file.stat().st_size for file in files)


@contextlib.contextmanager
def _damage_is_named(directory: pathlib.Path):
    try:
        yield
    except Exception as error:  # any part of Orbax may raise
        if parallel.is_lost(error) or remedy(error):
            raise
        raise InputError(
            f"{directory} cannot be read ({_first_line(error)}). Restore it from a copy, or train "
            "again in another directory."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _literal_path(directory: pathlib.Path):
    r"""Yields a path of a directory that Orbax does not misread.

    Orbax takes brackets and other wildcards in a path for a pattern, and finds nothing to merge;
    TensorStore writes to `a/b` for `a\b` and takes UTF-8 only; etils takes `/gs/...` for a bucket.
    For such a path a symbolic link in a temporary directory is yielded. All processes of a run use
    the same path, as Orbax requires.

    Raises:
      InputError: there is no temporary directory for the link.
    """
    if _is_literal(directory):
        yield directory
        return
    parallel.on_main(lambda: make_folder(directory))
    folder = parallel.on_main(lambda: _make_private_directory(directory))
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


def _make_private_directory(directory: pathlib.Path) -> str:
    """Creates an empty directory with a literal path, for a link to `directory`."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        with contextlib.suppress(OSError):
            if _is_literal(pathlib.Path(parent).absolute()):
                return tempfile.mkdtemp(prefix="fastflow_jax_", dir=parent)
    raise InputError(
        f"{directory} has a character in its path that Orbax cannot write under (one of * ? [ \\, "
        "or one that is not UTF-8), and there is no temporary directory for a link to it. Choose "
        "another --workdir, or set TMPDIR to a directory without such characters."
    )
