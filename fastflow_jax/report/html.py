"""A report on a run: one file that needs nothing else, to look at in a browser.

    write_reports("runs/screws")  # again, from what the run folder keeps; nothing is scored

Of several categories, variants or seeds each has a `report.html` in its own folder, and that of
the run links to them. Names of files are escaped, and the pages' security policy forbids them to
load anything.
"""

import base64
import json
import pathlib
from collections.abc import Mapping

import jinja2
import numpy as np

from fastflow_jax.evaluation.thresholds import f1_optimal
from fastflow_jax.files import files_in, read_lines, write_text
from fastflow_jax.report.charts import Line, histogram, line_chart, ticks
from fastflow_jax.report.table import TITLES, table_cells

_HERE = pathlib.Path(__file__).parent
_DETECTORS = {
    "fastflow": "FastFlow",
    "patchcore": "PatchCore",
    "spade": "SPADE",
    "cflow": "CFLOW",
    "vae": "VAE",
    "gan": "GANomaly",
}
_MOST_BYTES = 48 * 2**20  # of pictures, a third less than they take in the file
_FPR_LIMIT = 0.3  # of the curve of region overlap, as of `metrics.aupro`


def write_reports(workdir: str | pathlib.Path, results: Mapping | None = None) -> None:
    """Write `report.html` for a run and, where it has several parts, for each of them.

    Args:
      workdir: the run folder, see `runs.experiment.run`.
      results: what is to stand in `results.json`; None: what stands there.
    """
    workdir = pathlib.Path(workdir)
    if results is None:
        results = json.loads((workdir / "results.json").read_text("utf-8"))
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    files = files_in(workdir, "part.json")
    found = [(json.loads(file.read_text("utf-8")), file.parent) for file in files]
    names, variants = list(results["categories"]), list(results["variants"] or [None])
    parts = sorted(
        found,
        key=lambda p: (names.index(p[0]["name"]), variants.index(p[0]["variant"]), p[0]["seed"]),
    )
    if len(parts) == 1:
        part, folder = parts[0]
        write_text(workdir / "report.html", part_page(part, folder, config, results))
        return
    links = []
    for part, folder in parts:
        back = "../" * len(folder.relative_to(workdir).parts) + "report.html"
        page = part_page(part, folder, config, results, back=back)
        write_text(folder / "report.html", page)
        links.append((part, (folder / "report.html").relative_to(workdir).as_posix()))
    page = _template().render(
        title=f"{_detector(config)} on {config['data']['name']}",
        figures=_figures(results["mean"], results["std"]),
        protocol=_protocol(results, config),
        table=table_cells(results),
        links=links,
        provenance=_provenance(results, config),
    )
    write_text(workdir / "report.html", page)


def part_page(
    part: Mapping,
    folder: pathlib.Path,
    config: Mapping,
    results: Mapping,
    *,
    back: str | None = None,
) -> str:
    """The report on one training and its evaluation.

    Args:
      part: what stands in `part.json`. The slider begins at its threshold, above which scores are
        called anomalous, or else at the F1-optimal one on the test labels, and says so; with
        test images of one class, at the highest good score or below the lowest anomalous one.
      folder: the part's; `scores.json` and `strips/` may lie there.
      config: of the run, plain.
      results: of the run.
      back: where the report on the whole run lies, if there is another.
    """
    if part["variant"]:
        config = _changed(config, results["variants"][part["variant"]]["changes"])
    name = config["data"]["name"] + (f" {part['name']}" * (part["name"] != config["data"]["name"]))
    marks = [part["variant"], f"seed {part['seed']}" if config["seeds"] > 1 else None]
    file = folder / "scores.json"
    scored = json.loads(file.read_text("utf-8")) if file.exists() else {"images": []}
    decision = _decision(scored["images"], part["thresholds"]["image"])
    return _template().render(
        title=", ".join(filter(None, (f"{_detector(config)} on {name}", *marks))),
        figures=_figures(part["figures"], None),
        protocol=_protocol(results, config, part, scored["images"]),
        decision=decision,
        charts=_charts(part, folder / part.get("training", "."), scored, decision),
        gallery=decision and _gallery(scored, folder, decision),
        table=None if back else table_cells(results),
        back=back,
        provenance=_provenance(results, config, part),
    )


def _changed(config: Mapping, changes: Mapping) -> Mapping:
    """A variant's configuration, plain, of which sections are changed field by field."""
    sections = {k: v for k, v in changes.items() if isinstance(v, Mapping)}
    return config | changes | {k: _changed(config.get(k, {}), v) for k, v in sections.items()}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    files = {name: (_HERE / f"report.{name}").read_text("utf-8") for name in ("css", "js")}
    return environment.get_template("report.html.jinja", globals=files)


def _detector(config: Mapping) -> str:
    return _DETECTORS[config["detector"]]


def _figures(mean: Mapping, std: Mapping | None) -> list[tuple[str, str, str]]:
    """Title, value and deviation of each figure that there is."""
    return [
        (title, f"{mean[m]:.3f}", f"± {std[m]:.3f}" if std else "")
        for m, title in TITLES.items()
        if mean[m] is not None
    ]


def _protocol(results: Mapping, config: Mapping, part: Mapping | None = None, images=()) -> str:
    """What the figures are of, in words."""
    height, width = config["image_size"]
    of = results["protocol"]
    lines = [f"Last epoch; {of['chosen_on_test_data']} chosen on test data."]
    if images:
        bad = sum(image["label"] for image in images)
        lines.append(f"{len(images):,} test images: {len(images) - bad:,} good, {bad:,} anomalous.")
    if part:
        data = part["data"]
        lines.append(
            f"Trained on {data['trained_on']:,} good images, {data['held_out']:,} held out."
        )
    seeds = [part["seed"]] if part else of["seeds"]
    weights = part["weights"] if part else of["weights"]
    control = ", untrained: a control" if weights["source"] == "random" else ""
    lines.append(
        f"{config['backbone']}{control} at {height} × {width}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."
    )
    return " ".join(lines)


def _decision(images: list[dict], given: Mapping | None) -> dict | None:
    """What the slider needs, `given` a `thresholds.Threshold` or None; None without test images."""
    if not images:
        return None
    scores = np.array([image["score"] for image in images])
    finite = scores[np.isfinite(scores)]
    scores = np.clip(scores, finite.min(initial=0), finite.max(initial=0))  # JSON has no infinity
    labels = np.array([image["label"] for image in images], bool)
    if given:
        threshold = given["value"]
        threshold_is = (
            f"{given['rate']:.2g} of normal images lie above it, by {given['n']} that were held out"
        )
    elif labels.any():
        threshold = f1_optimal(scores, labels).value
        threshold_is = "below all scores" if labels.all() else "F1-optimal on the test labels"
    else:
        threshold, threshold_is = float(scores.max()), "the highest score"
    low, high = scores.min(), scores.max()
    # A few scores far out must not squeeze all others into one bar.
    kinds = ((scores[~labels], 0.99), (scores[labels], 0.5))
    typical = max(threshold, *(np.quantile(s, q) for s, q in kinds if len(s)))
    far = low + 2.5 * (typical - low)
    beyond = bool(low < far and far - low < 0.7 * (high - low))
    high = far if beyond else high
    room = 0.02 * (high - low) or 1.0
    low, high = float(min(low, threshold) - room), float(max(high, threshold) + room)
    return {
        "scores": scores,
        "labels": labels,
        "threshold": threshold,
        "threshold_is": threshold_is,
        "low": low,
        "high": high,
        "digits": int(max(0, 3 - np.floor(np.log10(high - low)))),
        "beyond": beyond,
        "ticks": {(v - low) / (high - low): text for v, text in ticks(low, high).items()},
        "histogram": histogram(low, high, scores[~labels], scores[labels]),
    }


def _charts(
    part: Mapping, training: pathlib.Path, scored: Mapping, decision: Mapping | None
) -> list[dict]:
    """ROC, PRO and training curves, as far as there are some."""
    charts, figures = [], part["figures"]
    two_kinds = decision is not None and 0 < decision["labels"].mean() < 1
    pixels = scored.get("pixel_curves")
    lines = []
    if pixels:
        x, y = ([0, *pixels[k], 1] for k in ("false_positive_rate", "true_positive_rate"))
        lines.append(Line(f"pixels, AUROC {figures['pixel_auroc']:.3f}", "second", x, y))
    if two_kinds:
        from sklearn.metrics import roc_curve  # slow to import

        x, y, _ = roc_curve(decision["labels"], decision["scores"])
        lines.insert(0, Line(f"images, AUROC {figures['image_auroc']:.3f}", "first", x, y))
    if lines:
        chart = line_chart(
            lines[::-1],
            title="ROC curves: " + "; ".join(line.name for line in lines),
            x_label="false-positive rate",
            y_label="true-positive rate",
            x_range=(0, 1),
            y_range=(0, 1),
            diagonal=True,
            point="point" if two_kinds else None,
        )
        charts.append({"title": "ROC", "lines": lines, "svg": chart})
    if pixels:
        x, y = ([0, *pixels[k], 1] for k in ("false_positive_rate", "overlap"))
        line = Line(f"regions, AUPRO {figures['aupro']:.3f}", "second", x, y)
        at = float(np.interp(_FPR_LIMIT, line.x, line.y))
        kept = [(a, b) for a, b in zip(line.x, line.y, strict=True) if a < _FPR_LIMIT]
        line = line._replace(x=[a for a, _ in kept] + [_FPR_LIMIT], y=[b for _, b in kept] + [at])
        chart = line_chart(
            [line],
            title=f"Region overlap over the false-positive rate of pixels: {line.name}",
            x_label="false-positive rate of pixels",
            y_label="overlap with regions",
            x_range=(0, _FPR_LIMIT),
            y_range=(0, 1),
        )
        charts.append({"title": "PRO", "lines": [line], "svg": chart})
    epochs = read_lines(training / "metrics.jsonl")
    lines = []
    for key, name, style in (("loss", "training", "first"), ("holdout_loss", "held out", "second")):
        rows = [(e["step"], e[key]) for e in epochs if np.isfinite(e.get(key, np.nan))]
        if len(rows) > 1:
            lines.append(Line(f"{name}, last {rows[-1][1]:.4g}", style, *zip(*rows, strict=True)))
    if lines:
        values = [y for line in lines for y in line.y]
        room = 0.05 * (max(values) - min(values)) or 1
        chart = line_chart(
            lines,
            title="Loss over training steps: " + "; ".join(line.name for line in lines),
            x_label="step",
            y_label="loss",
            x_range=(0, max(line.x[-1] for line in lines)),
            y_range=(min(values) - room, max(values) + room),
        )
        charts.append({"title": "Training", "lines": lines, "svg": chart})
    return charts


def _gallery(scored: Mapping, folder: pathlib.Path, decision: Mapping) -> dict:
    """What the script needs, and what is said of it."""
    images = scored["images"]
    files = {i: folder / "strips" / f"{i}.webp" for i in np.argsort(-decision["scores"]).tolist()}
    files = {i: file for i, file in files.items() if "size" in images[i] and file.exists()}
    every = -(-sum(file.stat().st_size for file in files.values()) // _MOST_BYTES)
    strips = [None] * len(images)
    for i, file in list(files.items())[:: max(1, every)]:
        strips[i] = base64.b64encode(file.read_bytes()).decode()
    defects = [image["defect"] for image in images]
    return {
        "data": {
            **{key: decision[key] for key in ("threshold", "low", "high", "digits")},
            "scores": decision["scores"].tolist(),
            "labels": decision["labels"].astype(int).tolist(),
            "names": [image["name"] for image in images],
            "defects": defects,
            "sizes": [image.get("size") for image in images],
            "strips": strips,
            "panels": scored.get("panels", []),
        },
        "defects": {d: defects.count(d) for d in sorted(set(defects))},
        "shown": sum(strip is not None for strip in strips),
        "of": len(images),
        "mib": sum(len(strip or "") for strip in strips) / 2**20,
        "panels": scored.get("panels", []),
        "mask_threshold": scored.get("mask_threshold"),
        "mask_threshold_is": scored.get("mask_threshold_is"),
    }


def _provenance(results: Mapping, config: Mapping, part: Mapping | None = None) -> dict:
    protocol = dict(results["protocol"])
    weights, data = protocol.pop("weights"), protocol.pop("data")
    return {
        "Protocol": protocol,
        "Weights": part["weights"] if part else weights,
        "Data": part["data"] if part else data,
        "Versions": results["versions"],
        "Seconds": part["seconds"] if part else results["seconds"],
        "Configuration": config,
    }
