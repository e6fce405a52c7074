"""Shared parts of the benchmarks: ratio lines, machine, versions, result files."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

_RATIO = re.compile(r"^ratio (\S+) ([0-9.eE+-]+)$", re.M)


@contextlib.contextmanager
def ratios() -> Iterator[dict[str, float]]:
    """Yields a dictionary of ratios and prints it at the end, also after SIGTERM or an error.

    Each line is `ratio <name> <number>`, the peer's seconds or bytes over ours.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        for name, number in found.items():
            print(f"ratio {name} {number:.3g}")
        sys.stdout.flush()


def parse_ratios(text: str) -> dict[str, float]:
    """Returns the ratios in the output of a benchmark by name."""
    return {name: float(number) for name, number in _RATIO.findall(text)}


def describe_machine(device: str | None = None) -> str:
    """Describes the machine: accelerator (if given), processor, cores, architecture."""
    names = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")][:1]
    parts = [*names, f"{os.cpu_count()} cores", platform.machine()]
    return ", ".join(([device] if device else []) + parts)


def commit() -> str:
    """Short hash of the commit that is checked out, or "unknown" outside of git.

    It ends with "-dirty" if the checkout was changed.
    """
    here = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the packages in this environment."""
    found = {p: importlib.metadata.version(p) for p in packages}
    return {"python": platform.python_version()} | found


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage also counts memory of the parent from before exec
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_result(file: pathlib.Path | None, content: dict) -> None:
    """Writes a JSON file atomically; does nothing if `file` is None."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)
