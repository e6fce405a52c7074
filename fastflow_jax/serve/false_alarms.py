"""False alarms that users mark: image files, for `--mode=update` to learn from."""

import contextlib
import hashlib
import os
import pathlib
import re
import shlex
import threading

from starlette.exceptions import HTTPException

from fastflow_jax.data.formats import readable_extensions
from fastflow_jax.errors import InputError
from fastflow_jax.files import make_folder, remedy, replacing

MAX_IMAGES = 1000  # of one update
MAX_BYTES = 4 * 2**30
_NAME = re.compile(r"[0-9a-f]{32}(\.[a-z0-9]+)?")


class FalseAlarms:
    """The marked images of one model, in a directory of its own.

    A file's name is made of the hash of its content, so that an image is stored once, and names
    from requests are never used as paths.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        run: pathlib.Path | None = None,
        *,
        max_images: int = MAX_IMAGES,
        max_bytes: int = MAX_BYTES,
    ):
        """Creates the directory if it does not exist.

        Args:
          folder: the directory.
          run: the run directory of the model, for `command`; None if it is unknown.
          max_images: largest number of files.
          max_bytes: largest size of all files together.

        Raises:
          InputError: the directory cannot be created or written.
        """
        self._folder, self._run = folder.absolute(), run
        self._max_images, self._max_bytes = max_images, max_bytes
        self._lock = threading.Lock()
        try:
            make_folder(self._folder)
            for unfinished in self._folder.glob("*.tmp"):  # of a server that was killed
                unfinished.unlink()
        except OSError as error:
            reason = f"{self._folder} cannot be written: {error.strerror}."
            raise InputError(f"{reason} Pass another directory as --false_alarms.") from error

    @property
    def command(self) -> str:
        """The command that teaches the images to the model."""
        run = "RUN" if self._run is None else os.fspath(self._run)
        words = [f"--workdir={run}", f"--input={self._folder}", "--keep_threshold"]
        return shlex.join(["fastflow-jax", "update", *words])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._files())

    def add(self, content: bytes, kind: str | None) -> tuple[str, bool]:
        """Stores the content of an image file unless it is stored already.

        Args:
          content: of a file that Pillow can read.
          kind: its format in Pillow, such as "PNG", for the extension.

        Returns:
          The name of the file, and whether it is new.

        Raises:
          HTTPException: status 507, too many files or bytes, or a full disk.
        """
        extension = f".{(kind or '').lower()}"
        extension = extension if extension in readable_extensions() else ""
        name = hashlib.sha256(content).hexdigest()[:32] + extension
        with self._lock:
            files = self._files()
            if name in files:
                return name, False
            if len(files) >= self._max_images:
                raise self._full(f"{len(files)} images")
            size = sum(file.stat().st_size for file in files.values())
            if size + len(content) > self._max_bytes:
                raise self._full(f"{size} bytes")
            self._write(self._folder / name, content)
        return name, True

    def remove(self, name: str) -> None:
        """Removes an image.

        Raises:
          HTTPException: status 404, there is no image of that name.
        """
        with self._lock:
            file = self._files().get(name)
            if file is None:
                raise HTTPException(404, f"There is no false alarm {name!r}. Mark the image again.")
            with contextlib.suppress(FileNotFoundError):  # removed by hand in the meantime
                os.unlink(file)

    def _files(self) -> dict[str, os.DirEntry]:
        try:
            with os.scandir(self._folder) as entries:
                return {entry.name: entry for entry in entries if _NAME.fullmatch(entry.name)}
        except FileNotFoundError:  # removed by hand after an update
            return {}

    def _write(self, file: pathlib.Path, content: bytes) -> None:
        try:
            make_folder(self._folder)
            with replacing(file, "wb") as opened:
                opened.write(content)
        except OSError as error:
            if not remedy(error):
                raise
            message = f"{self._folder} cannot be written: {error.strerror}. {remedy(error)}."
            raise HTTPException(507, message) from error

    def _full(self, amount: str) -> HTTPException:
        return HTTPException(
            507,
            f"{self._folder} has {amount}. Teach them with `fastflow-jax update`, then empty it.",
        )
