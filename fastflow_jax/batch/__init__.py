"""Scores of very many images: in shards, resumable, as Parquet files.

`run` scores directories, manifests and Parquet files, in this process or by Ray. In other engines,
such as Apache Beam, each worker calls a `scorer.Scorer`. Needs
`pip install 'fastflow-jax[batch]'`, and JAX only for detectors that are not exported.
"""

import dataclasses
import importlib
import os
from collections.abc import Sequence

from fastflow_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are scored."""

    rate: float | None = None  # false-alarm rate; None for the threshold of the detector
    tile: bool = False  # see `Predictor.predict`
    # Store anomaly maps, "npy" in float32 or "png16" in 16 bits, see `prediction.encode_map`.
    maps: str | None = None
    # Of exported detectors:
    threads: int | None = 1  # CPU threads of each process; None for $NPROC, or one per core
    providers: Sequence[str] = ("CPUExecutionProvider",)  # of ONNX Runtime


def run(
    model: str | os.PathLike,
    inputs: str,
    output: str | os.PathLike,
    *,
    shard: str = "1/1",
    column: str = "path",
    options: Options | None = None,
    ray: int = 0,
    part_rows: int = 1000,
) -> int:
    """Scores images and writes Parquet files with a row per image or page.

    When called again, also with another number of shards, it scores what is missing: new and
    changed images, images with errors, and those that an interrupted call had not written.

    Args:
      model: an exported detector (`.onnx`), or a directory or `.zip` file for `Detector.load`.
      inputs: a directory with images, an image or a glob pattern; or one or several (by a glob
        pattern) `.txt`, `.csv`, `.jsonl` or `.parquet` files, see `items.find_items`.
      output: directory of the Parquet files; the columns are in `scorer.SCHEMA`.
      shard: "3/16" for the third of sixteen parts of the images. Each part is scored by one
        process.
      column: of paths or, in Parquet files, of the content of image files.
      options: how images are scored; by default as `Options()`.
      ray: number of Ray workers, each with one core; 0 to score in this process.
      part_rows: a file is written after this number of rows, or after 64 MiB of maps.

    Returns:
      Exit status, for the images of this shard: 0 if all are normal, 1 if some are anomalous, 3 if
      some could not be read, 4 if the detector has no threshold.

    Raises:
      InputError: a package, the model or the images are missing, an argument is invalid, `output`
        has results of another detector or with other options, or another process writes them.
    """
    for package, extra in (("pyarrow", "batch"), *[("ray", "ray")] * (ray > 0)):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"Scoring needs {package}. Run pip install 'fastflow-jax[{extra}]'."
            ) from error
    from fastflow_jax.batch import job

    options = Options() if options is None else options
    part = job.Part(shard, part_rows, ray)
    return job.score(model, inputs, output, column, options, part)
