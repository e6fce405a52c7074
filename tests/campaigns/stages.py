"""Commands that the campaign of faults disturbs, each with what it needs and what it writes."""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tarfile
import tempfile
from collections.abc import Callable

import outputs
import processes
import tiny

from fastflow_jax.errors import InputError

_KNN = ("--config.detector=knn", "--config.backbone=pixels", "--config.image_size=32")
_KNN = (*_KNN, "--config.weights=random", "--config.audit=0", "--config.heatmaps=1")
_KNN = (*_KNN, "--config.report_pictures=1", "--config.batch_size=2")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
      words: arguments of the command, from the shared directory and the directory of the case.
      output: what it writes, in the directory of the case.
      before: prepares the directory of the case.
      statuses: of success.
      begun: whether the stage has begun, given the directory of the case.
      of_run: whether it needs the detector of a finished run.
    """

    words: Callable[[pathlib.Path, pathlib.Path], list[str]]
    output: str = "run"
    before: Callable[[pathlib.Path, pathlib.Path], None] = lambda shared, case: None
    statuses: tuple[int, ...] = (0,)
    begun: Callable[[pathlib.Path], bool] = lambda case: True
    of_run: bool = False


def _train(*more: str) -> Callable[[pathlib.Path, pathlib.Path], list[str]]:
    return lambda shared, case: tiny.arguments(shared / "data", f"--workdir={case / 'run'}", *more)


def _fit(*more: str) -> Callable[[pathlib.Path, pathlib.Path], list[str]]:
    """Arguments of a training without gradients."""
    return lambda shared, case: [
        *("train", "--config=folder", f"--config.data.root={shared / 'data'}"),
        *(*_KNN, f"--workdir={case / 'run'}", *more),
    ]


def _copy_run(shared: pathlib.Path, case: pathlib.Path) -> None:
    shutil.copytree(shared / "run", case / "run")


def _pack(shared: pathlib.Path, case: pathlib.Path) -> None:
    (case / "raw").mkdir()
    with tarfile.open(case / "raw/bottle.tar.xz", "w:xz") as packed:
        packed.add(shared / "data", "bottle")


def _prepare(shared: pathlib.Path, case: pathlib.Path) -> list[str]:
    root, target = f"--config.data.root={case / 'raw'}", f"--config.data.dir={case / 'run'}"
    return ["data", "mvtec_ad/bottle", root, target]


def _update(shared: pathlib.Path, case: pathlib.Path) -> list[str]:
    return ["update", f"--workdir={case / 'run'}", f"--input={shared / 'new'}"]


def _predict(shared: pathlib.Path, case: pathlib.Path) -> list[str]:
    where = f"--input={shared / 'data/test'}", f"--output={case / 'out'}"
    return ["predict", f"--workdir={shared / 'run'}", *where, "--raw=npy"]


def _export(shared: pathlib.Path, case: pathlib.Path) -> list[str]:
    return ["export", f"--workdir={shared / 'run'}", f"--output={case / 'out/detector.onnx'}"]


def _all_epochs(case: pathlib.Path) -> bool:
    file = case / "run/metrics.jsonl"
    return file.exists() and file.read_text().count("\n") == tiny.EPOCHS


STAGES = {
    "training": Stage(_train()),
    "feature caching": Stage(_fit("--config.train.cache=disk")),
    "data preparation": Stage(_prepare, before=_pack, statuses=(1,)),  # other numbers of images
    "calibration": Stage(_train(), begun=_all_epochs),
    "export": Stage(_export, "out", lambda shared, case: (case / "out").mkdir(), of_run=True),
    "update": Stage(_update, before=_copy_run, of_run=True),
    "prediction": Stage(_predict, "out", statuses=(1,), of_run=True),
}


class Place:
    """A directory with what all cases share, and the outcome of each undisturbed stage."""

    def __init__(self, folder: pathlib.Path, *, train: int = 16, test: int = 3):
        self.folder, self.shared = folder, folder / "shared"
        self._n, self._references = 0, {}
        tiny.write_images(self.shared / "data", train=train, test=test)
        tiny.write_images(self.shared / "other", train=4, test=0, seed=1)
        shutil.copytree(self.shared / "other/train/good", self.shared / "new")

    def train(self) -> None:
        """Trains the detector that the other stages use."""
        words = _fit()(self.shared, self.shared)
        status, _ = processes.run(words, self.shared / "log")
        if status != 0:
            raise RuntimeError((self.shared / "log").read_text()[-500:])

    def new_case(self, stage: Stage) -> pathlib.Path:
        """A new directory for a case."""
        self._n += 1
        case = self.folder / f"case_{self._n:04}"
        case.mkdir()
        stage.before(self.shared, case)
        return case

    def start(self, stage: Stage, case: pathlib.Path, **how) -> processes.Command:
        """Starts the command of a stage in the directory of a case."""
        return processes.start(stage.words(self.shared, case), case / "log", **how)

    def reference(self, stage: Stage) -> tuple[dict[str, str], float]:
        """The files of an undisturbed command, and the seconds of CPU time that it took."""
        if stage not in self._references:
            self._references[stage] = self._undisturbed(stage)
        return self._references[stage]

    def _undisturbed(self, stage: Stage) -> tuple[dict[str, str], float]:
        if stage.of_run and not (self.shared / "run").exists():
            self.train()
        for _ in range(2):  # the first one compiles
            case = self.new_case(stage)
            command = self.start(stage, case)
            seconds = command.watch(begun=functools.partial(stage.begun, case))
            if command.status() not in stage.statuses:
                raise RuntimeError(f"The undisturbed command failed: {command.text[-500:]}")
        return outputs.snapshot(case / stage.output), seconds

    def again(self, stage: Stage, case: pathlib.Path, expected: dict[str, str]) -> str | None:
        """Starts a disturbed command again; returns what is wrong, before or afterwards."""
        if broken := outputs.incomplete(case / stage.output):
            return f"incomplete files under their final name: {', '.join(broken)}"
        command = self.start(stage, case)
        return self.finished(stage, case, command, expected)

    def finished(
        self, stage: Stage, case: pathlib.Path, command: processes.Command, expected: dict[str, str]
    ) -> str | None:
        """Waits for a command that must succeed; returns what is wrong with it or its files."""
        status = command.status()
        if status not in stage.statuses:
            return f"status {status}: {command.text[-1000:]}"
        if "Traceback" in command.text:
            return f"a traceback: {command.text[-1000:]}"
        try:
            differing = outputs.differences(case / stage.output, expected)
        except InputError as error:  # of the reader of checkpoints
            return str(error)
        return ", ".join(differing) or None


@functools.cache
def place() -> Place:
    """The directory of all trials of this process, which is removed at its end."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="campaign_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Place(folder)


def refusal(command: processes.Command, limit: float = processes.LIMIT) -> str | None:
    """Waits for a command that may fail with one message; returns what is wrong with its end."""
    status, text = command.status(limit), command.text
    if status is None:
        return f"it did not end within {limit:g} s: {text[-300:]}"
    if "Traceback" in text:
        return f"a traceback: {text[-1000:]}"
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status < 0 or (status > 1 and len(errors) != 1):
        return f"status {status} with {len(errors)} messages: {text[-1000:]}"
    return None
