"""Power failures by simulation: the disk as it may be left at any moment of a command.

`strace` records what a command writes. A model of a disk then drops what was not synchronised:
content of files since their last fsync, and names since the last fsync of their directory, each
independently of the others, so that they may also be reordered.
"""

import dataclasses
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from campaign import Options, Skipped
from processes import XLA_FLAGS
from stages import STAGES, Place, Stage, place

_CALLS = "openat,write,writev,pwrite64,lseek,ftruncate,fsync,fdatasync,close,mkdir,mkdirat,unlink"
_CALLS += ",unlinkat,rmdir,rename,renameat,renameat2"
_LINE = re.compile(r"^([\d.]+) (\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?", re.S)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"^(\d+)<(.*?)>(?=,|$)")


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


@dataclasses.dataclass
class _File:
    data: bytearray = dataclasses.field(default_factory=bytearray)
    synced: bytes = b""


@dataclasses.dataclass
class _Directory:
    names: dict[str, "_File | _Directory"] = dataclasses.field(default_factory=dict)
    synced: dict[str, "_File | _Directory"] = dataclasses.field(default_factory=dict)


_Node = _File | _Directory
# Directories and names that change together, with the new node of each name, or None.
_Change = list[tuple[_Directory, str, _Node | None]]


class Disk:
    """A directory, its content in memory and on the disk."""

    def __init__(self, root: pathlib.Path):
        self._root, self._top = root, self._read(root)
        self._pending: list[_Change] = []
        self._opened: dict[int, list] = {}  # node, position, whether it appends

    def _read(self, path: pathlib.Path) -> _Node:
        if path.is_file():
            content = path.read_bytes()
            return _File(bytearray(content), content)
        names = {each.name: self._read(each) for each in path.iterdir()}
        return _Directory(names, dict(names))

    def _find(self, path: str) -> tuple[_Directory, str] | None:
        """The directory of a path and the name in it; None outside of the root."""
        try:
            parts = pathlib.PurePath(path).relative_to(self._root).parts
        except ValueError:
            return None
        node: _Node | None = self._top
        for name in parts[:-1]:
            node = node.names.get(name) if isinstance(node, _Directory) else None
        return (node, parts[-1]) if parts and isinstance(node, _Directory) else None

    def _node(self, path: str) -> _Node | None:
        if path == str(self._root):
            return self._top
        place = self._find(path)
        return place[0].names.get(place[1]) if place else None

    def _change(self, *changes: tuple[_Directory, str, _Node | None]) -> None:
        for directory, name, node in changes:
            _set(directory.names, name, node)
        self._pending.append(list(changes))

    def apply(self, call: str, paths: Sequence[str], words: str, result: int, data: bytes) -> None:
        """Applies a system call that has succeeded."""
        match = _FD.match(words)
        number = int(match[1]) if match else -1
        opened = self._opened.get(number)
        place = self._find(paths[0]) if paths else None
        if call == "openat":
            self._open(paths[0], place, words, result)
        elif call == "close":
            self._opened.pop(number, None)
        elif call in ("mkdir", "mkdirat") and place:
            self._change((*place, _Directory()))
        elif call in ("unlink", "unlinkat", "rmdir") and place:
            self._change((*place, None))
        elif call.startswith("rename") and place and (target := self._find(paths[1])):
            node = place[0].names.get(place[1])
            self._change((*place, None), (*target, node))
        elif opened is not None:
            self._use(call, opened, words, result, data)

    def _open(self, path: str, place, words: str, result: int) -> None:
        if place is None and path != str(self._root):
            self._opened.pop(result, None)
            return
        node = self._node(path)
        if node is None and place is not None:
            node = _File()
            self._change((*place, node))
        if isinstance(node, _File) and "O_TRUNC" in words:
            node.data.clear()
        self._opened[result] = [node, 0, "O_APPEND" in words]

    def _use(self, call: str, opened: list, words: str, result: int, data: bytes) -> None:
        node, position, appends = opened
        if call in ("fsync", "fdatasync"):
            if isinstance(node, _File):
                node.synced = bytes(node.data)
            else:
                self._synchronise(node)
        elif call == "lseek":
            opened[1] = result
        elif call == "ftruncate":
            size = int(words.rpartition(",")[2])
            node.data[size:] = bytes(max(0, size - len(node.data)))
        elif call in ("write", "pwrite64"):
            at = len(node.data) if appends else position
            if call == "pwrite64":
                at = int(words.rpartition(",")[2])
            node.data[len(node.data) :] = bytes(max(0, at - len(node.data)))
            node.data[at : at + result] = data[:result]
            if call == "write":
                opened[1] = at + result

    def _synchronise(self, directory: _Directory) -> None:
        """Makes all changes of names durable that concern a directory."""
        waiting = []
        for change in self._pending:
            if any(each is directory for each, _, _ in change):
                for each, name, node in change:
                    _set(each.synced, name, node)
            else:
                waiting.append(change)
        self._pending = waiting

    def after_power_failure(self, target: pathlib.Path, rng: np.random.Generator) -> None:
        """Writes the directory as the failure may leave it."""
        names = {id(d): (d, dict(d.synced)) for c in self._pending for d, _, _ in c}
        for change in self._pending:
            if rng.random() < 0.5:
                for directory, name, node in change:
                    _set(names[id(directory)][1], name, node)
        self._write(self._top, target, names, rng)

    def _write(self, node: _Node, path: pathlib.Path, names: dict, rng) -> None:
        if isinstance(node, _Directory):
            path.mkdir(exist_ok=True)
            content = names[id(node)][1] if id(node) in names else node.synced
            for name, each in content.items():
                self._write(each, path / name, names, rng)
            return
        content = node.synced
        if content != node.data and (choice := rng.integers(3)):
            cut = int(rng.integers(len(node.data) + 1))
            content = bytes(node.data[:cut]) if choice == 1 else bytes(len(node.data))
        path.write_bytes(content)


def _set(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def record(words: Sequence[str], folder: pathlib.Path, statuses: tuple[int, ...]) -> list[tuple]:
    """Runs a command; returns the arguments of `Disk.apply` for its system calls, in order.

    Raises:
      Skipped: there is no strace, or it may not trace.
    """
    if shutil.which("strace") is None:
        raise Skipped("strace is not installed")
    folder.mkdir()
    trace = ["strace", "-ff", "-y", "-xx", "-ttt", "-s", "16777216", "-o", str(folder / "trace")]
    trace += ["--seccomp-bpf", "-e", f"trace={_CALLS}", "-e", "signal=none"]
    command = [sys.executable, "-m", "fastflow_jax.main", *words]
    variables = {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1", "XLA_FLAGS": XLA_FLAGS}
    done = subprocess.run(
        [*trace, *command], env=os.environ | variables, capture_output=True, text=True
    )
    if "ptrace" in done.stderr:
        raise Skipped(f"strace may not trace: {done.stderr[:200]}")
    if done.returncode not in statuses:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[-500:]}")
    files = sorted(folder.glob("trace.*"))
    lines = itertools.chain(*(file.read_text().splitlines() for file in files))
    calls = [match for line in lines if (match := _LINE.match(line)) and int(match[4]) >= 0]
    shutil.rmtree(folder)
    return [_parsed(match) for match in sorted(calls, key=lambda match: float(match[1]))]


def _parsed(match: re.Match[str]) -> tuple[str, list[str], str, int, bytes]:
    call, words, result = match[2], match[3], int(match[4])
    strings = [_decoded(text) for text in _STRING.findall(words)]
    rest = _STRING.sub("", words)
    if "write" in call:
        return call.replace("writev", "write"), [], rest, result, b"".join(strings)
    folders = [_decoded(text).decode() for text in re.findall(r"<((?:\\x[0-9a-f]{2})*)>", rest)]
    paths = [os.path.join(*folders[i : i + 1], os.fsdecode(s)) for i, s in enumerate(strings)]
    return call, [os.path.normpath(path) for path in paths], rest, result, b""


def failures(options: Options) -> Iterator[str | None]:
    """The power fails at a random moment of a command, or after it; then the same command runs."""
    names = ("prediction", "training", "update", "export", "data preparation", "feature caching")
    here = place()
    for name in names[: options.number(short=1, long=len(names))]:
        stage = STAGES[name]
        expected, _ = here.reference(stage)
        yield from _failures(options, here, name, stage, expected)


def _failures(
    options: Options, here: Place, name: str, stage: Stage, expected: dict[str, str]
) -> Iterator[str | None]:
    """Failures of one command, which is recorded once; the last one is after its end."""
    case = here.new_case(stage)
    (case / stage.output).mkdir(exist_ok=True)
    before = options.folder / "before"
    shutil.copytree(case, before)
    calls = record(stage.words(here.shared, case), options.folder / "trace", stage.statuses)
    shutil.rmtree(case)
    before.rename(case)
    rng = np.random.default_rng([options.seed, *name.encode()])
    moments = sorted(rng.integers(0, len(calls), options.number(short=2, long=5) - 1).tolist())
    disk, done = Disk(case), 0
    disks = []
    for moment in [*moments, len(calls)]:
        for call in calls[done:moment]:
            disk.apply(*call)
        done = moment
        left = options.folder / f"left_{moment}"
        disk.after_power_failure(left, rng)
        disks.append((moment, left))
    for moment, left in disks:
        shutil.rmtree(case)
        left.rename(case)
        found = here.again(stage, case, expected)
        yield found and f"{name}, power failed after {moment} of {len(calls)} calls: {found}"
