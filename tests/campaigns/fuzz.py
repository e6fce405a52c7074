"""Campaign: hostile and broken input for the readers of files, requests and flags.

Valid files are changed: bytes, numbers, values of JSON, members of archives, chunks of images. A
file that reaches new lines of its reader is changed further. Each case is read in an empty
directory by a child process with limits on memory, files and time, see `hostile.sandbox`. A reader
survives a case if it returns, or raises an InputError with one clear message. It must not open a
file outside of the directory for writing, run code from the file, start a process or open a
connection.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Iterator

import campaign
from campaign import Options
from hostile.child import Child

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"  # cases that found something
SECONDS = 20  # for a target in the long form

_MAX_DEATHS = 20  # of the child process in a trial

# Row of the table: module and name of the target.
TARGETS = {
    "weights: .pth, zip": ("hostile.weight_files", "weights_zip"),
    "weights: .pth, legacy": ("hostile.weight_files", "weights_legacy"),
    "weights: .safetensors": ("hostile.weight_files", "weights_safetensors"),
    "weights: .npz": ("hostile.weight_files", "weights_npz"),
    "arrays of a run: .npz": ("hostile.weight_files", "arrays"),
    "saved detectors": ("hostile.detectors", "detector_zip"),
    "run directories": ("hostile.detectors", "run"),
    "configurations, products, metrics: JSON": ("hostile.tables", "records"),
    "feature caches": ("hostile.detectors", "cache"),
    "exported detectors: ONNX": ("hostile.detectors", "exported"),
    "archives of data sets: .zip": ("hostile.archives", "archive_zip"),
    "archives of data sets: .tar": ("hostile.archives", "archive_tar"),
    "npm packages": ("hostile.archives", "runtime"),
    "images and masks: PNG": ("hostile.image_files", "image_png"),
    "images and masks: JPEG": ("hostile.image_files", "image_jpeg"),
    "images and masks: TIFF": ("hostile.image_files", "image_tiff"),
    "images and masks: BMP": ("hostile.image_files", "image_bmp"),
    "images and masks: WebP": ("hostile.image_files", "image_webp"),
    "images and masks: GIF": ("hostile.image_files", "image_gif"),
    "images and masks: PPM, ICO, TGA, DDS, JPEG 2000, PCX, SGI": (
        "hostile.image_files",
        "image_other",
    ),
    "masks: LabelMe, COCO": ("hostile.tables", "polygons"),
    "manifests: CSV": ("hostile.tables", "manifest_csv"),
    "manifests: JSON": ("hostile.tables", "manifest_json"),
    "lists to leave out, tables of groups": ("hostile.tables", "lists"),
    "lists of batch jobs: .txt": ("hostile.tables", "batch_txt"),
    "lists of batch jobs: .csv": ("hostile.tables", "batch_csv"),
    "lists of batch jobs: .jsonl": ("hostile.tables", "batch_jsonl"),
    "lists of batch jobs: .parquet": ("hostile.tables", "batch_parquet"),
    "HTTP requests": ("hostile.requests", "requests"),
    "flags of the command line": ("hostile.flags", "flags"),
}
_child = Child()  # of all trials, because its start takes seconds


def corpus(target: str) -> list[bytes]:
    """The cases that found something in a target."""
    return [file.read_bytes() for file in sorted((CORPUS / target).glob("*"))]


def trial(module: str, target: str, options: Options) -> Iterator[str | None]:
    """Tries the corpus and changed files on a target."""
    plan = {"module": module, "target": target, "seed": options.seed}
    cases, lines = [case.hex() for case in corpus(target)], {}
    n, start = 0, time.monotonic()
    for _ in range(_MAX_DEATHS):
        left = SECONDS + start - time.monotonic() if options.long else None
        for entry in _child.run(plan | {"seconds": left, "tried": n, "corpus": cases}):
            for line, is_reached in entry["lines"].items():
                lines[line] = lines.get(line, False) or is_reached
            n += entry["cases"]
            yield from [None] * (entry["cases"] - len(entry["lost"]))
            yield from entry["lost"]
        options.figures["coverage"] = round(sum(lines.values()) / max(1, len(lines)), 3)
        if _child.is_alive:
            return
        n += 1
        yield _child.last_words()
        cases, plan["seed"] = [], plan["seed"] + 1000


def close() -> None:
    """Ends the child process."""
    _child.close()


TRIALS = {title: functools.partial(trial, *names) for title, names in TARGETS.items()}

if __name__ == "__main__":
    sys.exit(
        campaign.main(
            __doc__,
            TRIALS,
            data="valid files that the campaign makes, tests/goldens, and tests/campaigns/corpus",
            packages=("jax", "numpy", "pillow", "onnxruntime", "safetensors", "starlette"),
        )
    )
