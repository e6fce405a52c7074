"""HTML report of a run: one file per training, without external resources.

    write_reports("runs/screws")  # rewrites the reports from the files in the run directory

If a run has several categories, variants or seeds, each has a `report.html` in its own directory,
and that of the run links to them. File names are escaped, and the security policy of the pages
forbids them to load anything.
"""

import base64
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jinja2
import numpy as np

from fastflow_jax.decision import Threshold
from fastflow_jax.detectors.base import method
from fastflow_jax.evaluation.advice import on_threshold
from fastflow_jax.evaluation.thresholds import f1_optimal
from fastflow_jax.files import files_in, parse_json, read_lines, write_text
from fastflow_jax.report.audit import read_audit
from fastflow_jax.report.charts import Line, histogram, line_chart, ticks
from fastflow_jax.report.details import kind_cells, size_cells
from fastflow_jax.report.table import TITLES, shown_metrics, table_cells

_HERE = pathlib.Path(__file__).parent
_MOST_BYTES = 48 * 2**20  # of strips; base64 makes them a third larger in the report
_FPR_LIMIT = 0.3  # of the PRO curve, as in `metrics.aupro`


def write_reports(workdir: str | pathlib.Path, results: Mapping | None = None) -> None:
    """Writes `report.html` for a run and, if it has several trainings, for each of them.

    Args:
      workdir: run directory of `runs.experiment.run`.
      results: content of `results.json`, or None to read the file.
    """
    workdir = pathlib.Path(workdir)
    results = _read(workdir / "results.json") if results is None else results
    config = _read(workdir / "config.json")
    found = [(_read(file), file.parent) for file in files_in(workdir, "part.json")]
    names, variants = list(results["categories"]), list(results["variants"] or [None])
    parts = sorted(
        found,
        key=lambda p: (names.index(p[0]["name"]), variants.index(p[0]["variant"]), p[0]["seed"]),
    )
    if len(parts) == 1:
        write_text(workdir / "report.html", part_page(*parts[0], config, results))
        return
    links = []
    for part, folder in parts:
        back = "../" * len(folder.relative_to(workdir).parts) + "report.html"
        page = part_page(part, folder, config, results, back=back)
        write_text(folder / "report.html", page)
        links.append((part, (folder / "report.html").relative_to(workdir).as_posix()))
    page = _template().render(
        title=f"{method(config['detector']).title} on {config['data']['name']}",
        figures=_figures(results["protocol"], results["mean"], results["std"]),
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
    """Returns the report of one training and its evaluation.

    The slider starts at the image threshold of the training. Without one, it starts at the
    F1-optimal threshold of the test images or, if these are of one class, at the highest score of
    good images or below the lowest score of anomalous ones. The page names the origin.

    Args:
      part: content of `part.json`.
      folder: directory of the training, with `scores.json` and `strips/` if there are test images.
      config: configuration of the run as a dict.
      results: content of `results.json`.
      back: link to the report of the whole run, or None if there is no other report.
    """
    if part["variant"]:
        config = _changed(config, results["variants"][part["variant"]]["changes"])
    name = config["data"]["name"] + (f" {part['name']}" * (part["name"] != config["data"]["name"]))
    marks = [part["variant"], f"seed {part['seed']}" if config["seeds"] > 1 else None]
    file = folder / "scores.json"
    scored = _read(file) if file.exists() else {"images": []}
    decision = _decision(scored["images"], part["thresholds"]["image"])
    return _template().render(
        title=", ".join(filter(None, (f"{method(config['detector']).title} on {name}", *marks))),
        figures=_figures(results["protocol"], part["figures"], None),
        protocol=_protocol(results, config, part, scored["images"]),
        shift=(part.get("shift") or {}).get("message"),
        decision=decision,
        charts=_charts(part, folder / part.get("training", "."), scored, decision),
        kinds=kind_cells(part.get("kinds") or []),
        sizes=size_cells(part.get("sizes") or []),
        gallery=decision and _gallery(scored, folder, decision),
        audit=read_audit(folder),
        table=None if back else table_cells(results),
        back=back,
        provenance=_provenance(results, config, part),
    )


def write_audit_page(folder: pathlib.Path) -> None:
    """Writes `audit.html` for the audit in a directory, see `runs.audit`."""
    audit = read_audit(folder)
    assert audit is not None
    counts = {"normal images": audit["images"], "listed": audit["listed"]}
    page = _template().render(
        title=f"Audit of {audit['name']}",
        figures=[(name, f"{count:,}", "") for name, count in counts.items()],
        audit=audit,
    )
    write_text(folder / "audit.html", page)


def _read(file: pathlib.Path) -> dict[str, Any]:
    return cast(dict, parse_json(file))


def _changed(config: Mapping, changes: Mapping) -> dict:
    """Returns the configuration of a variant, a dict with changes in nested sections."""
    sections = {k: v for k, v in changes.items() if isinstance(v, Mapping)}
    nested = {k: _changed(config.get(k, {}), v) for k, v in sections.items()}
    return {**config, **changes, **nested}


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    parts = {"css": ("theme.css", "report.css"), "js": ("report.js",)}
    texts = {
        kind: "".join((_HERE / name).read_text("utf-8") for name in names)
        for kind, names in parts.items()
    }
    return environment.get_template("report.html.jinja", globals=texts)


def _figures(protocol: Mapping, mean: Mapping, std: Mapping | None) -> list[tuple[str, str, str]]:
    """Returns title, value and standard deviation of each metric of the table."""
    return [
        (TITLES[m], f"{mean[m]:.3f}", f"± {std[m]:.3f}" if std and std.get(m) is not None else "")
        for m in shown_metrics(protocol, [mean])
    ]


def _protocol(results: Mapping, config: Mapping, part: Mapping | None = None, images=()) -> str:
    """Describes the evaluation in words."""
    height, width = config["image_size"]
    protocol = results["protocol"]
    lines = [f"Last epoch; {protocol['chosen_on_test_data']} chosen on test data."]
    if images:
        bad = sum(image["label"] for image in images)
        lines.append(f"{len(images):,} test images: {len(images) - bad:,} good, {bad:,} anomalous.")
    if part:
        n, held_out = part["data"]["trained_on"], part["data"]["held_out"]
        lines.append(f"Trained on {n:,} good images, {held_out:,} held out.")
        lines.append(on_threshold(part["thresholds"]["image"], part["data"]))
    seeds = [part["seed"]] if part else protocol["seeds"]
    weights = part["weights"] if part else protocol["weights"]
    control = " with random weights (a control)" if weights["source"] == "random" else ""
    lines.append(
        f"{config['backbone']}{control} at {height} × {width}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."
    )
    if protocol.get("roi"):  # runs of earlier versions have none
        lines.append(f"Pixels in the region of interest count: {protocol['roi']}.")
    return " ".join(lines)


def _decision(images: list[dict], given: Mapping | None) -> dict[str, Any] | None:
    """Returns scores, labels, threshold and histogram for the slider; None without test images.

    Args:
      images: entries of `scores.json`.
      given: image `thresholds.Threshold` as a dict, or None.
    """
    if not images:
        return None
    scores = np.array([image["score"] for image in images])
    finite = scores[np.isfinite(scores)]
    scores = np.clip(scores, finite.min(initial=0), finite.max(initial=0))  # JSON has no infinity
    labels = np.array([image["label"] for image in images], bool)
    if given:
        threshold = given["value"]
        threshold_is = Threshold(**given).promise
    elif labels.any():
        threshold = f1_optimal(scores, labels).value
        threshold_is = "below all scores" if labels.all() else "F1-optimal on the test labels"
    else:
        threshold, threshold_is = float(scores.max()), "the highest score"
    low, high = scores.min(), scores.max()
    # If a few scores are far above the others, the range ends before them.
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
    """Returns the ROC, PRO and training curves for which there are data."""
    figures, pixels = part["figures"], scored.get("pixel_curves")
    charts = [_roc(figures, pixels, decision), _pro(figures, pixels), _losses(training)]
    return [chart for chart in charts if chart is not None]


def _chart(name: str, lines: list[Line], description: str, **axes) -> dict | None:
    """Returns a chart for the template, with the first line on top; None without lines."""
    if not lines:
        return None
    title = f"{description}: {'; '.join(line.name for line in lines)}"
    return {"title": name, "lines": lines, "svg": line_chart(lines[::-1], title=title, **axes)}


def _roc(figures: Mapping, pixels: Mapping | None, decision: Mapping | None) -> dict | None:
    lines, point = [], None
    if decision is not None and 0 < decision["labels"].mean() < 1:
        from sklearn.metrics import roc_curve  # slow to import

        x, y, _ = roc_curve(decision["labels"], decision["scores"])
        lines.append(Line(f"images, AUROC {figures['image_auroc']:.3f}", "first", x, y))
        point = "point"
    if pixels:
        x, y = ([0, *pixels[k], 1] for k in ("false_positive_rate", "true_positive_rate"))
        lines.append(Line(f"pixels, AUROC {figures['pixel_auroc']:.3f}", "second", x, y))
    labels = {"x_label": "false-positive rate", "y_label": "true-positive rate"}
    ranges = {"x_range": (0, 1), "y_range": (0, 1)}
    return _chart("ROC", lines, "ROC curves", **labels, **ranges, diagonal=True, point=point)


def _pro(figures: Mapping, pixels: Mapping | None) -> dict | None:
    if not pixels:
        return None
    x, y = ([0, *pixels[k], 1] for k in ("false_positive_rate", "overlap"))
    end = float(np.interp(_FPR_LIMIT, x, y))
    shown = [(a, b) for a, b in zip(x, y, strict=True) if a < _FPR_LIMIT] + [(_FPR_LIMIT, end)]
    line = Line(f"regions, AUPRO {figures['aupro']:.3f}", "second", *zip(*shown, strict=True))
    title = "Region overlap over the false-positive rate of pixels"
    labels = {"x_label": "false-positive rate of pixels", "y_label": "region overlap"}
    return _chart("PRO", [line], title, **labels, x_range=(0, _FPR_LIMIT), y_range=(0, 1))


def _losses(training: pathlib.Path) -> dict | None:
    epochs, lines = read_lines(training / "metrics.jsonl"), []
    for key, name, style in (("loss", "training", "first"), ("holdout_loss", "held out", "second")):
        rows = [(e["step"], e[key]) for e in epochs if np.isfinite(e.get(key, np.nan))]
        if len(rows) > 1:
            lines.append(Line(f"{name}, last {rows[-1][1]:.4g}", style, *zip(*rows, strict=True)))
    values = [y for line in lines for y in line.y]
    low, high = min(values, default=0), max(values, default=0)
    room = 0.05 * (high - low) or 1
    axes = {"x_label": "step", "y_label": "loss", "y_range": (low - room, high + room)}
    last = max((line.x[-1] for line in lines), default=1)
    return _chart("Training", lines, "Loss over training steps", **axes, x_range=(0, last))


def _gallery(scored: Mapping, folder: pathlib.Path, decision: Mapping) -> dict:
    """Returns the data of the script, and what the template says about the gallery."""
    images = scored["images"]
    files = {i: folder / "strips" / f"{i}.webp" for i in np.argsort(-decision["scores"]).tolist()}
    files = {i: file for i, file in files.items() if "size" in images[i] and file.exists()}
    every = -(-sum(file.stat().st_size for file in files.values()) // _MOST_BYTES)
    strips: list[str | None] = [None for _ in images]
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
            "aupimo": [image.get("aupimo") for image in images],
            "sizes": [image.get("size") for image in images],
            "strips": strips,
            "panels": scored.get("panels", []),
        },
        "defects": {d: defects.count(d) for d in sorted(set(defects))},
        "has_aupimo": any(image.get("aupimo") is not None for image in images),
        "shown": sum(strip is not None for strip in strips),
        "mib": sum(len(strip or "") for strip in strips) / 2**20,
        "mask_threshold": scored.get("mask_threshold"),
        "mask_threshold_is": scored.get("mask_threshold_is"),
    }


def _provenance(results: Mapping, config: Mapping, part: Mapping | None = None) -> dict:
    protocol = dict(results["protocol"])
    source = {key: protocol.pop(key) for key in ("weights", "data")}
    source = part or source | {"seconds": results["seconds"]}
    figures = part["figures"] if part else results["mean"]
    return {
        "Metrics": {
            t: f"{figures[m]:.4f}" for m, t in TITLES.items() if figures.get(m) is not None
        },
        "Protocol": protocol,
        "Weights": source["weights"],
        "Data": source["data"],
        "Versions": results["versions"],
        "Seconds": source["seconds"],
        "Configuration": config,
    }
