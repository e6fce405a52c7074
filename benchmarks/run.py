"""Runs the benchmarks, keeps their ratios, writes the tables of `docs/speed.md` and the README.

    pip install -e '.[bench]'
    python benchmarks/run.py --quick                      # each under five minutes if idle
    python benchmarks/run.py --quick memory metrics       # some
    python benchmarks/run.py --tile FOLDER                # in full: hours
    python benchmarks/run.py --gpu                        # the GPU's table, under ten minutes
    python benchmarks/run.py --table                      # only writes the tables

Each runs by itself under a limit of time; one that fails or is cut short does not stop the others,
and what it has found until then is kept. Ctrl-C and SIGTERM cut the running one short and end. What
is found replaces what `results/<name>.json` holds of the same benchmark in the same form; the rest
stays. The name is `cpu` or `gpu` unless `--name` gives another; the tables are of these two.
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

from outcome import describe_machine, parse_ratios, write_result

HERE = pathlib.Path(__file__).parent
RESULTS, DOCUMENT = HERE / "results", HERE.parent / "docs/speed.md"
README = HERE.parent / "README.md"
BENCHMARKS = (
    "training_step",
    "time_to_quality",
    "inference",
    "detectors",
    "backbones",
    "memory",
    "metrics",
    "permutation",
    "growth",
)
# What a GPU is for, with the seconds of each: under ten minutes in all.
GPU_LIMITS = {
    "training_step": 180,
    "inference": 120,
    "backbones": 90,
    "memory": 90,
    "permutation": 60,
}
QUICK_LIMIT = 600  # of what takes less than half of it where nothing else runs
GRACE = 30  # seconds that a benchmark has to end in once its time is up
NO_LIMIT = 7 * 24 * 3600  # `communicate` forgets what it has read if it is interrupted without one
INTERRUPTED = "interrupted"
DEVICES = {"cpu": "CPU", "gpu": "GPU"}
NOT_MEASURED = "not measured"
QUICK = " --quick"  # at the end of the key of a quick form
# Ratios that stand in the README, in words.
HEADLINES = {
    "time_to_quality_elpv_mono": "image files to anomalib's last AUROC, its best, ELPV mono",
    "time_to_quality_elpv_mono_cached_features": "had anomalib cached features too, ELPV mono",
    "time_to_best_magnetic_tile": "image files to anomalib's best AUROC, magnetic tile",
    "time_to_best_magnetic_tile_cached_features": "had anomalib cached features too, magnetic tile",
    "time_to_quality_magnetic_tile": (
        "image files to anomalib's last AUROC, magnetic tile (.588; it had .631 after one epoch)"
    ),
    "tf_efficientnet_lite0_float32_batch1_all": "an image scored, Lite0, published form",
    "resnet18_float32_batch1_all": "an image scored, ResNet18, published form",
    "tf_efficientnet_lite0_float32_batch32_cached_anomalib": (
        "a training step, both on cached features, Lite0, published form"
    ),
    "resnet18_float32_batch32_cached_anomalib": (
        "a training step, both on cached features, ResNet18, published form"
    ),
    "tf_efficientnet_lite0_float32_batch32_as_run_anomalib": (
        "a training step, anomalib's with its backbone as it runs it, Lite0, published form"
    ),
    "resnet18_float32_batch32_as_run_anomalib": (
        "a training step, anomalib's with its backbone as it runs it, ResNet18, published form"
    ),
    "aupro_7M_pixels": "AUPRO of 7 million pixels",
    "memory_aupro_7M_pixels": "AUPRO of 7 million pixels, memory",
    "reversible_20_steps_tf_efficientnet_lite0_default_recipe": (
        "memory of a training step, 20 flow steps: autodiff's over the reversible flow's"
    ),
    "resident_training_tf_efficientnet_lite0_batch8": (
        "memory of a training process, EfficientNet-Lite0, published form"
    ),
}


def run_one(script: pathlib.Path, arguments: list[str], limit: float = NO_LIMIT) -> dict:
    """What a benchmark found: status, seconds, ratios, and the tables that it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it has started ends with it
    )
    status = None
    try:
        output, _ = process.communicate(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        cut = isinstance(reason, subprocess.TimeoutExpired)
        status = f"cut at {limit:.0f} s" if cut else INTERRUPTED
        process.terminate()  # it prints what it has
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
    """The accelerator's name, from a process that then lets go of it."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\t')"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    platform, _, kind = found.splitlines()[-1].partition("\t")
    return None if platform == "cpu" else kind


def tables(results: dict[str, dict]) -> str:
    """Markdown of all benchmarks, from what `results/cpu.json` and `gpu.json` hold."""
    parts = []
    for device, title in DEVICES.items():
        machines = {found["machine"] for found in results.get(device, {}).values()}
        parts.append(f"{title}: {'; '.join(sorted(machines)) or NOT_MEASURED}.")
    results = {DEVICES[device]: _once(found) for device, found in results.items() if found}
    keys = {key for found in results.values() for key in found}
    for key in sorted(keys, key=lambda key: (BENCHMARKS.index(key.partition(".")[0]), key)):
        of = {title: found[key] for title, found in results.items() if key in found}
        parts.append(f"### `{key}`")
        parts += [
            f"{title}: {found['status']}."
            for title, found in of.items()
            if found["status"] != "done"
        ]
        names = dict.fromkeys(name for found in of.values() for name in found["ratios"])
        if names:
            lines = [f"| ratio | {' | '.join(results)} |", f"|---|{'---:|' * len(results)}"]
            for name in names:
                numbers = [
                    of[title]["ratios"].get(name) if title in of else None for title in results
                ]
                cells = [NOT_MEASURED if n is None else f"{n:.3g}" for n in numbers]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        for title, found in of.items():
            if found["table"]:
                parts += [f"{title}:", "\n".join(found["table"])]
    return "\n\n".join(parts)


def _once(found: dict[str, dict]) -> dict[str, dict]:
    """What was found on a device, without what a quick form repeats of the full one."""
    kept = {}
    for key, form in found.items():
        full = found.get(key.removesuffix(QUICK)) if key.endswith(QUICK) else None
        if full:
            ratios = {n: ratio for n, ratio in form["ratios"].items() if n not in full["ratios"]}
            form = form | {"ratios": ratios, "table": [] if full["table"] else form["table"]}
        if form["ratios"] or form["table"]:
            kept[key] = form
    return kept


def headlines(results: dict[str, dict]) -> str:
    """Markdown of the few ratios that the README has; full forms go before quick ones."""
    lines = [f"| | {' | '.join(DEVICES.values())} |", "|---|---:|---:|"]
    for name, words in HEADLINES.items():
        cells = []
        for device in DEVICES:
            benchmarks = sorted(results.get(device, {}).items())
            found = [b["ratios"][name] for _, b in benchmarks if name in b["ratios"]]
            cells.append(f"{found[0]:.3g}" if found else NOT_MEASURED)
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def between_markers(document: str, text: str) -> str:
    """The document with the text between its two markers."""
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    if begin not in document or end not in document:
        raise ValueError(f"the document has no {begin} and {end}")
    head, rest = document.split(begin)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def write_tables() -> None:
    """Put what is in `results/` into the documents."""
    files = {device: RESULTS / f"{device}.json" for device in DEVICES}
    results = {device: json.loads(f.read_text()) for device, f in files.items() if f.exists()}
    for document, text in ((DOCUMENT, tables(results)), (README, headlines(results))):
        document.write_text(between_markers(document.read_text(), text))


def main() -> None:
    """Run what is asked for, write after each what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="benchmark", help="all where none is named"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="each under five minutes")
    form.add_argument("--gpu", action="store_true", help="the GPU's table, under ten minutes")
    form.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--tile", type=pathlib.Path, help="the magnetic tile set, as a folder")
    parser.add_argument("--name", help="of the file in results/; cpu and gpu are in the tables")
    args = parser.parse_args()
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        parser.error(f"there is no {min(unknown)}; there is {', '.join(BENCHMARKS)}")
    if args.table:
        write_tables()
        return

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, see `run_one`
    kind = accelerator()
    if args.gpu and kind is None:
        sys.exit("JAX sees no GPU here: pip install -e '.[cuda]'")
    file = RESULTS / f"{args.name or ('gpu' if kind else 'cpu')}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    quick = args.quick or args.gpu
    failed = []
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
            result[key] = {"machine": describe_machine(kind)} | found
            write_result(file, result)
        if found["status"] != "done":
            failed.append(f"{name}: {found['status']}")
        if found["status"] == INTERRUPTED:
            break
    write_tables()
    if failed:
        sys.exit(", ".join(failed))


if __name__ == "__main__":
    main()
