"""Runs the speed and memory benchmarks and stores their ratios in `results/`.

    pip install -e '.[bench]'
    python benchmarks/run.py --quick                      # each under five minutes if idle
    python benchmarks/run.py --quick memory metrics       # some of them
    python benchmarks/run.py --tile FOLDER                # in full: hours
    python benchmarks/run.py --gpu                        # on a GPU, under ten minutes

Each benchmark runs in a process of its own with a time limit. If one fails or is cut short, the
ratios it has printed are stored and the next one runs. Ctrl-C and SIGTERM end the current one and
stop. Results replace those of the same benchmark in the same form in `results/<name>.json`; the
name is `cpu` or `gpu`, or the one of `--name`. `python benchmarks/tables.py` then rewrites the
tables.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from outcome import commit, describe_machine, parse_ratios, write_result

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
BENCHMARKS = (
    *("training_step", "time_to_quality", "inference", "detectors", "backbones", "memory"),
    "metrics",
)
# Benchmarks that use a GPU, with their time limits in seconds: under ten minutes in all.
GPU_LIMITS = {"training_step": 180, "inference": 120, "backbones": 90, "memory": 90}
QUICK_LIMIT = 600  # seconds; twice what the slowest quick form takes on an idle machine
GRACE = 30  # seconds between the request to end and the kill
NO_LIMIT = 7 * 24 * 3600  # `communicate` loses its output if interrupted without a timeout
INTERRUPTED = "interrupted"
QUICK = " --quick"  # ends the key of a quick form


def run_one(script: pathlib.Path, arguments: list[str], limit: float = NO_LIMIT) -> dict:
    """Runs a benchmark; returns its status, seconds, ratios and the tables that it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its child processes are ended with it
    )
    status = None
    try:
        output, _ = process.communicate(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        cut = isinstance(reason, subprocess.TimeoutExpired)
        status = f"cut at {limit:.0f} s" if cut else INTERRUPTED
        process.terminate()  # it then prints its ratios
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if status:
        output, _ = process.communicate()
    print(output, flush=True)
    return {
        "status": status or ("done" if process.returncode == 0 else "failed"),
        "seconds": round(time.perf_counter() - start, 1),
        "ratios": parse_ratios(output),
        "table": [line for line in output.splitlines() if line.startswith("|")],
    }


def accelerator() -> str | None:
    """Name of the accelerator, or None. Asked in another process, which releases the device."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\t')"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    platform, _, kind = found.splitlines()[-1].partition("\t")
    return None if platform == "cpu" else kind


def main() -> None:
    """Runs the requested benchmarks and stores the results of each as it ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="benchmark", help="Benchmarks to run; default: all."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="Run short forms.")
    form.add_argument("--gpu", action="store_true", help="Run short forms on a GPU.")
    parser.add_argument("--tile", type=pathlib.Path, help="Directory of the magnetic tile set.")
    parser.add_argument("--name", help="Name of the file in results/; default: cpu or gpu.")
    args = parser.parse_args()
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        parser.error(f"{min(unknown)} is no benchmark. Choose from {', '.join(BENCHMARKS)}.")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, see `run_one`
    kind = accelerator()
    if args.gpu and kind is None:
        sys.exit("JAX found no GPU. Install its GPU version: pip install -e '.[cuda]'")
    file = RESULTS / f"{args.name or ('gpu' if kind else 'cpu')}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    measured = result.setdefault("benchmarks", {})
    at, quick, failed = commit(), args.quick or args.gpu, []
    for name in args.benchmarks or (GPU_LIMITS if args.gpu else BENCHMARKS):
        arguments = ["--quick"] if quick else []
        if name == "time_to_quality" and args.tile and not quick:
            arguments += ["--tile", str(args.tile)]
        limit = QUICK_LIMIT if quick else NO_LIMIT
        if args.gpu:
            limit = GPU_LIMITS.get(name, limit)
        key = f"{name}.py{QUICK if quick else ''}"
        print(f"== {key}", flush=True)
        found = run_one(HERE / f"{name}.py", arguments, limit)
        if found["ratios"] or found["table"]:
            measured[key] = {
                "command": " ".join(["python", f"benchmarks/{name}.py", *arguments]),
                "commit": at,
                "machine": describe_machine(kind),
            } | found
            write_result(file, result)
        if found["status"] != "done":
            failed.append(f"{name}: {found['status']}")
        if found["status"] == INTERRUPTED:
            break
    if failed:
        sys.exit(", ".join(failed))


if __name__ == "__main__":
    main()
