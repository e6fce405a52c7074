"""Image AUROC of our FastFlow after each epoch, with the seconds that it took.

    python benchmarks/our_fastflow.py --data elpv/mono --out ours.json

Training of the default recipe with its curve, the counterpart of `anomalib_fastflow.py`. Seconds
start when the data are on disk and the weights are loaded. They include decoding, features,
compilation and the calibration of the epoch, and exclude evaluation and the test images' features.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np
from outcome import describe_machine, versions, write_result

from fastflow_jax import data
from fastflow_jax.backbones import create_backbone
from fastflow_jax.config import default, fill
from fastflow_jax.detectors.fastflow import scorer as fastflow
from fastflow_jax.evaluation.evaluate import measure, score_split
from fastflow_jax.features.extract import cached_features
from fastflow_jax.features.prepare import feature_batches
from fastflow_jax.features.split import split_holdout


def configuration(name: str):
    """Filled default recipe for `elpv/mono`, `elpv/poly` or a directory."""
    config = default()
    if name.startswith("elpv/"):
        config.data.name, _, config.data.category = name.partition("/")
    else:
        config.data.name, config.data.root = "folder", name
    return fill(config)


def train_with_curve(config, folder: pathlib.Path) -> list[dict]:
    """Trains in a directory; returns a row per epoch."""
    dataset = data.open_dataset(config.data)
    backbone = create_backbone(config.backbone, layers=config.layers)
    start, not_counted, calibration, curve = time.perf_counter(), 0.0, None, []

    def features(source, rows=None):
        maps = [batch.features for batch in feature_batches(config, backbone, source, rows)]
        return tuple(map(np.concatenate, zip(*maps, strict=True)))

    train, held_out = split_holdout(len(dataset.train), config.data.holdout)
    training = cached_features(features(dataset.train, train))
    holdout = features(dataset.train, held_out)

    pause = time.perf_counter()
    test = list(feature_batches(config, backbone, dataset.test))
    not_counted += time.perf_counter() - pause

    def on_epoch(epoch, scorer):
        nonlocal not_counted, calibration
        ended = time.perf_counter()
        calibrated = scorer()
        # A run calibrates once, after the last epoch, and compiles it then. Here that is the first.
        calibration = calibration or time.perf_counter() - ended
        seconds = ended - start - not_counted + calibration
        scored = score_split(calibrated.score, test, len(dataset.test), progress=f"epoch {epoch}")
        figures = measure(scored)
        auroc = {k: figures[k] for k in ("image_auroc", "pixel_auroc")}
        curve.append({"epoch": epoch, "seconds": round(seconds, 2), **auroc})
        not_counted += time.perf_counter() - ended
        return {}

    fastflow.fit(config, training, holdout, seed=config.seed, folder=folder, on_epoch=on_epoch)
    return curve


def main() -> None:
    """Trains and writes the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="elpv/mono, elpv/poly or a directory")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # An empty compilation cache: programs are compiled once, as in a first run.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        curve = train_with_curve(configuration(args.data), pathlib.Path(folder))
    result = {
        "question": __doc__.partition("\n")[0],
        "device": jax.default_backend(),
        "machine": describe_machine(),
        "versions": versions("jax", "flax"),
        "curve": curve,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
