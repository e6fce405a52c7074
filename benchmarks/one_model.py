"""One model of several products against a model for each, and how it grows with the products.

    python benchmarks/one_model.py --sets elpv/mono photos/screws photos/nuts --out one_model.json
    python benchmarks/one_model.py --archives DOWNLOADS --data SETS --sets elpv/mono --growth 1 4 15

Sets are those of `many_sets.py`. Each is a product: the first table compares its figures in one
model with those of its own model, with the same features, seed and recipe; the products of its test
images are recognised, and those of its normal test images are unknown to a model of the other sets.

`--growth` trains models of these numbers of products, each with the same 48 training images of the
first directory in `--sets`, under other names: seconds to train, megabytes of the saved model and
milliseconds to predict an image.
"""

import argparse
import json
import pathlib
import shlex
import sys
import tempfile
import time
from typing import Any

import many_sets
import numpy as np
from outcome import commit, describe_machine, write_result

from fastflow_jax.data.layout import find_images
from fastflow_jax.detector import Detector
from fastflow_jax.evaluation.evaluate import measure, score_split
from fastflow_jax.features.extract import image_means
from fastflow_jax.features.gate import Gate
from fastflow_jax.features.prepare import Prepared, preparer
from fastflow_jax.runs.fit import Fitted, fit
from fastflow_jax.runs.products import Membership, fit_shared, of_several

_IMAGES = 48  # of each product with --growth


def trained(config: Any, prepared: Prepared, name: str, member: Membership | None) -> Fitted:
    """Trains a product, alone or as a member of one model."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        return fit(config, prepared, seed=0, directory=place, member=member, label=name)


def figures(fitted: Fitted, prepared: Prepared, name: str) -> dict[str, float]:
    """Metrics on the test images."""
    test = prepared.dataset.test
    assert test is not None
    score = fitted.scorer.score
    return measure(score_split(score, prepared.test(), len(test), progress=f"{name}: test"))


def compare(
    config: Any, prepared: dict[str, Prepared], own: dict[str, dict], folder: pathlib.Path
) -> list[dict]:
    """Rows of the first table: a product each; `own` are figures of its own model, if known."""
    c, start = of_several(config, len(prepared)), time.perf_counter()
    shared = fit_shared(c, prepared, folder, 0)
    print(f"shared training: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    rows, references = [], []
    for i, (name, p) in enumerate(prepared.items()):
        member = trained(c, p, name, Membership(i, shared))
        references.append(member.reference)
        row = {"name": name.replace("_", " ")}
        alone = own.get(name) or figures(trained(config, p, name, None), p, name)
        for kind, found in (("one", figures(member, p, name)), ("own", alone)):
            row |= {f"{kind} {of}": found[of] for of in ("image_auroc", "pixel_auroc", "aupro")}
        rows.append(row)
        print(row, file=sys.stderr)
    means = [np.concatenate([image_means(b.features) for b in p.test()]) for p in prepared.values()]
    gate = Gate.fit(references)
    for i, (row, p) in enumerate(zip(rows, prepared.values(), strict=True)):
        found = gate(means[i])
        others = Gate.fit([r for j, r in enumerate(references) if j != i])
        good = means[i][p.dataset.test.labels == 0]
        row["recognised"] = float((found.is_known & (found.product == i)).mean())
        row["unknown"] = float((~others(good).is_known).mean())
    return rows


def grow(root: pathlib.Path, counts: list[int]) -> list[dict]:
    """Rows of the second table: a number of products each."""
    good = root / "train" / "good"
    images, rows = sorted(find_images(good if good.is_dir() else root).images)[:_IMAGES], []
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            saved, start = pathlib.Path(folder, "model"), time.perf_counter()
            several = {f"product {i}": images for i in range(n)}
            model = Detector.fit(several if n > 1 else images)
            seconds = time.perf_counter() - start
            model.save(saved)
            size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
            model.predict(images)
            start = time.perf_counter()
            model.predict(images)
            each = (time.perf_counter() - start) / len(images)
        rows.append(
            {
                "name": str(n),
                "fit": f"{seconds:.0f}",
                "size": f"{size / 1e6:.0f}",
                "predict": f"{1e3 * each:.0f}",
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="*", default=[], help="As in many_sets.py.")
    parser.add_argument("--archives", type=pathlib.Path, help="As in many_sets.py.")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("sets"))
    parser.add_argument("--detector", default="fastflow", help="Detector of both models.")
    parser.add_argument(
        "--own", type=pathlib.Path, help="File of many_sets.py with the figures of own models."
    )
    parser.add_argument("--growth", type=int, nargs="*", default=[], help="Numbers of products.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("one_model.json"))
    args = parser.parse_args()
    trainings = json.loads(args.own.read_text())["trainings"] if args.own else []
    own = {
        each["set"]: each["figures"]
        for each in trainings
        if (each["detector"], each["seed"]) == (args.detector, 0)
    }
    found = many_sets.unpack(args.archives, args.data) if args.archives else []
    sets = many_sets.find_sets([*args.sets, *found])
    about = {
        "command": f"python benchmarks/one_model.py {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "machine": describe_machine(),
        "seeds": "0",
        "data": ", ".join(sets),
    }
    if args.growth:
        root = next(fields["data.root"] for fields in sets.values() if "data.root" in fields)
        columns = {
            "name": "products",
            "fit": "training, s",
            "size": "saved, MB",
            "predict": "prediction, ms per image",
        }
        rows = grow(pathlib.Path(root), args.growth)
        write_result(args.out, about | {"columns": columns, "rows": rows})
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared = {}
        for name, fields in sets.items():
            config = many_sets.configuration(args.detector, fields)
            prepare = preparer(config, pathlib.Path(folder, name.replace("/", "_")))
            prepared[name] = prepare(config, config.data.category, 0)
        config = many_sets.configuration(args.detector, {})
        rows = compare(config, prepared, own, pathlib.Path(folder, "shared"))
    columns = {
        "name": "product",
        "one image_auroc": "one model: image AUROC",
        "own image_auroc": "own model: image AUROC",
        "one pixel_auroc": "one model: pixel AUROC",
        "own pixel_auroc": "own model: pixel AUROC",
        "recognised": "test images recognised",
        "unknown": "unknown to a model of the others",
    }
    write_result(args.out, about | {"columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
