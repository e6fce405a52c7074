"""Data sets that users download by hand: found packed or unpacked, and unpacked where needed."""

import contextlib
import gzip
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax.data.tfds.prepared import Raw, data_dir
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, lock

_LOCK = ".unpacking"
_SCRATCH = f"{_LOCK}-"
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile),
    *(gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
)


def manual_dir(config: ConfigDict) -> Path:
    """Where raw files are looked for: `config.root`, else downloads/manual/<name> in `data_dir`."""
    if config.root is not None:
        return expanded(config.root).resolve()
    return (data_dir(config) / "downloads/manual" / config.name).resolve()


def find_raw(config: ConfigDict, archives: Sequence[str], download: str) -> Raw:
    """The folder of `config.category`, in the manual folder or one level deeper.

    Of the archives that are there the first one is unpacked if the category is missing.

    Args:
        config: `config.data`.
        archives: names of files that may hold the category.
        download: what to download, for the message.

    Raises:
        InputError: it is not there, an archive is damaged, or there is no room to unpack it.
    """
    folder = manual_dir(config)
    found = _find_category(folder, config.category)
    present = [folder / archive for archive in archives if (folder / archive).is_file()]
    if found is None and present:
        target = _target(present[0])
        if target.exists():
            raise InputError(
                f"{target} lacks {config.category}: remove it, and {present[0]} is unpacked anew."
            )
        unpack(present[0])
        found = _find_category(folder, config.category)
    if found is None:
        raise InputError(f"{config.name} ({config.category}) is not in {folder}. {download}")
    return Raw(found, str(folder))


def _find_category(folder: Path, category: str) -> Path | None:
    for candidate in (folder, *sorted(folder.glob("*"))):
        if (candidate / category / "train").is_dir():
            return candidate / category
    return None


def unpack(archive: Path) -> None:
    """Unpacks a tar or zip file beside itself, into a folder of its name without extensions.

    If the archive holds one folder only, this takes the name. The folder appears when it is whole.
    Of several processes one unpacks at a time in a folder of archives.

    Raises:
        InputError: the archive is damaged, or there is no room.
    """
    folder, target = archive.parent, _target(archive)

    def say_so():
        tqdm.write(f"waiting for another process that unpacks in {folder}")

    try:
        with lock(folder / _LOCK, on_wait=say_so) as is_alone:
            if target.exists():  # another process was faster
                return
            for leftover in folder.glob(f"{_SCRATCH}*") if is_alone else ():
                shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed
            _unpack(archive, target)
    except OSError as error:
        raise InputError(
            f"{archive} cannot be unpacked ({error}): make room there, "
            "or unpack it elsewhere and set data.root to that folder."
        ) from error


def _unpack(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=archive.parent) as scratch:
        content = Path(scratch, "content")
        with open_archive(archive) as packed:
            if isinstance(packed, tarfile.TarFile):
                packed.extractall(content, filter="data")
            else:
                packed.extractall(content)
        inner = [path for path in content.iterdir() if path.name != "__MACOSX"]
        is_wrapped = len(inner) == 1 and inner[0].is_dir()
        try:
            (inner[0] if is_wrapped else content).rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, where there are no locks
                raise


def _target(archive: Path) -> Path:
    return archive.parent / archive.name.partition(".")[0]


@contextlib.contextmanager
def open_archive(archive: Path) -> Iterator[tarfile.TarFile | zipfile.ZipFile]:
    """A tar or zip file to be read once, from its start to its end, with its progress shown.

    Raises:
        InputError: the archive is damaged, was cut off, or is packed in a way that is not known.
    """
    size = archive.stat().st_size
    title = f"unpacking {archive.name}"
    try:
        with (
            open(archive, "rb") as file,
            tqdm.wrapattr(file, "read", size, desc=title, delay=1) as stream,
            zipfile.ZipFile(stream)
            if archive.suffix == ".zip"
            else tarfile.open(fileobj=stream, mode="r:*") as packed,
        ):
            yield packed
            if isinstance(packed, tarfile.TarFile):
                # An archive cut off between two members looks like a shorter one to tarfile; only
                # the end of the compressed stream, with its checksum, tells them apart.
                while packed.fileobj.read(1 << 20):
                    pass
    except _DAMAGE as error:
        problem = " ".join(str(error).split())  # tarfile's messages may run over several lines
        raise InputError(f"{archive} is damaged ({problem}): download it once more.") from error
    except NotImplementedError as error:  # as zipfile says of ways to compress
        raise InputError(f"{archive} cannot be unpacked here ({error}): do it by hand.") from error
