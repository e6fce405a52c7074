"""Writes models.json, the table of backbones in docs/models.md, and checks it.

    python benchmarks/models.py            # then python benchmarks/tables.py
    python benchmarks/models.py --check    # exits with 1 if the file differs

Licences, parameters and strides are those of `fastflow_jax.backbones.BACKBONES`. Figures are
copied from other files in `benchmarks/results/`; what they do not have was not measured.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from fastflow_jax.backbones import BACKBONES
from fastflow_jax.backbones.spec import Spec
from fastflow_jax.backbones.weights import licence, origin
from fastflow_jax.config import default

RESULTS = pathlib.Path(__file__).parent / "results"
_NOTE = {
    "page": "docs/models.md",
    "command": "python benchmarks/models.py; figures are copied from seeds.json, cpu.json and "
    "footprint.json, which name their commands",
    "commit": "those of the files",
    "machine": "those of the files",
    "seeds": "those of the files",
    "data": "accuracy: the five sets of seeds.json; timm's seconds: one random image, random "
    "weights; JAX's seconds: CPU time of one model input with FastFlow; memory: peak of a process "
    "that loads FastFlow and scores one image",
}
_COLUMNS = {
    "name": "backbone",
    "parameters": "parameters, millions",
    "strides": "strides",
    "licence": "licence of the default weights",
    "image_auroc": "mean image AUROC of five sets",
    "aupro": "mean AUPRO of four sets",
    "timm": "timm's seconds over ours",
    "onnx": "JAX's CPU seconds over those of ONNX Runtime",
    "jax_memory": "peak memory in JAX, MiB",
    "onnx_memory": "peak memory in ONNX Runtime, MiB",
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _row(
    spec: Spec,
    timm: dict[str, float],
    footprints: dict[str, dict[str, Any]],
    of_default: dict[str, Any],
) -> dict[str, Any]:
    """The cells of a backbone; figures that were not measured are missing."""
    strides = sorted({stride for _, stride in spec.maps.values()})
    row = {
        "name": f"`{spec.name}`",
        "parameters": f"{spec.parameters / 1e6:.1f}",
        "strides": ", ".join(map(str, strides)),
        "licence": licence(origin(spec, None)),
    }
    ratio = timm.get(f"{spec.name}_float32_batch1")
    if ratio is not None:
        row["timm"] = f"{ratio:.3g}"
    if spec.name in footprints:
        seconds, size = footprints[spec.name]["seconds"], footprints[spec.name]["bytes"]
        row["onnx"] = f"{seconds['jax'] / seconds['onnx']:.3g}"
        row |= {f"{engine}_memory": f"{size[engine] / 2**20:.0f}" for engine in ("jax", "onnx")}
    return row | (of_default if spec.name == default().backbone else {})


def build() -> dict[str, Any]:
    """Returns the content of models.json."""
    (mean,) = (row for row in _read("seeds")["rows"] if row["name"] == "mean")
    timm = _read("cpu")["benchmarks"]["backbones.py"]["ratios"]
    footprints = {row["backbone"]: row for row in _read("footprint")["rows"]}
    of_default = {"image_auroc": mean["image AUROC"], "aupro": mean["AUPRO"]}
    known = (spec for spec in BACKBONES.values() if spec.tag)
    rows = [_row(spec, timm, footprints, of_default) for spec in known]
    return {**_NOTE, "columns": _COLUMNS, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if stale.")
    args = parser.parse_args(argv)
    file = RESULTS / "models.json"
    text = json.dumps(build(), indent=1, ensure_ascii=False) + "\n"
    if not args.check:
        file.write_text(text)
    elif not file.is_file() or file.read_text() != text:
        print("models.json differs. Run python benchmarks/models.py.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
