"""Results as a table: plain text, Markdown and CSV."""

import csv
import difflib
import io
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastflow_jax.errors import InputError

# Metrics by their importance: tables show the first `_COLUMNS` with values. docs/metrics.md
# defines them.
TITLES = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "pixel_ap": "pixel AP",
    "aupimo": "AUPIMO",
    "image_ap": "image AP",
    "image_f1": "image F1",
    "aupro_10": "AUPRO .1",
    "aupro_05": "AUPRO .05",
    "pixel_f1": "pixel F1",
    "seg_f1": "SegF1",
    "spro_05": "sPRO .05",
}
_COLUMNS = 5
_NEXT_TO_PUBLISHED = ("image_auroc", "pixel_auroc", "aupro")  # metrics in a table with others


class Published(NamedTuple):
    """Published results of one system, a column of the table."""

    system: str
    metric: str  # "image_auroc" or "pixel_auroc"
    source: str
    mean: float
    categories: int  # number of categories in the mean
    figures: dict[str, float]  # by category


def published(dataset: str, backbone: str) -> tuple[Published, ...]:
    """Returns the published results for a data set and backbone, the paper's first."""
    file = pathlib.Path(__file__).with_name("published.json")
    columns = json.loads(file.read_text("utf-8")).get(dataset, {})
    return tuple(Published(**each) for each in columns.get(backbone, columns.get("any", [])))


def check_metrics(names: Sequence[str]) -> None:
    """Raises InputError if `config.metrics` has a name that is no metric."""
    for name in names:
        if name not in TITLES:
            near = difflib.get_close_matches(name, TITLES, n=1, cutoff=0)[0]
            raise InputError(
                f"config.metrics has {name!r}. Did you mean {near}? There are {', '.join(TITLES)}."
            )


def shown_metrics(protocol: Mapping, rows: Iterable[Mapping]) -> list[str]:
    """Returns the metrics of a table in their order, given all of its rows.

    These are the metrics of `config.metrics` or, without them, the first five of `TITLES`. Metrics
    that all rows lack are left out.
    """
    rows = list(rows)
    chosen = protocol.get("metrics") or []
    known = [m for m in chosen or TITLES if any(row.get(m) is not None for row in rows)]
    return known if chosen else known[:_COLUMNS]


def format_table(results: Mapping) -> str:
    """Formats the content of `results.json` as plain text.

    The table has a row per category and their mean, with its standard deviation over several seeds,
    or a row per variant. `shown_metrics` are its columns; published results for the same data and
    backbone have columns of their own.
    """
    heads, rows, notes = _table(results)
    cells = [*zip(*heads, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [first.ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(aligned).rstrip())
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    if rows[-1][0] == "mean":
        lines.insert(-1, rule)
    head = [line for line in lines[:2] if line]
    return "\n".join([*head, rule, *lines[2:], *([""] if notes else []), *notes])


def table_cells(results: Mapping) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the heads (the first is empty), rows and notes of the table of `format_table`."""
    heads, rows, notes = _table(results)
    return [f"{system} {title}".strip() for system, title in heads], rows, notes


def format_markdown(results: Mapping) -> str:
    """Formats the table as Markdown, with the notes below it."""
    heads, body, notes = table_cells(results)
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *body]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def format_csv(results: Mapping) -> str:
    """Formats the table as comma-separated values, with all notes in the last column."""
    heads, body, notes = table_cells(results)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", *heads[1:], "notes"])
    writer.writerows([*row, "; ".join(notes)] for row in body)
    return file.getvalue()


def _table(results: Mapping) -> tuple[list[tuple[str, str]], list[list[str]], list[str]]:
    """Returns heads (system, "" for the run's own results, and title), rows of cells, and notes."""
    protocol, categories = results["protocol"], results["categories"]
    if results["variants"]:
        rows = {name: (each["mean"], each["std"]) for name, each in results["variants"].items()}
        others = ()
    else:
        rows = {name: (figures, None) for name, figures in categories.items()}
        rows["mean"] = (results["mean"], results["std"])
        others = published(protocol["dataset"], protocol["backbone"])
    heads, columns, notes = [("", "")], [list(rows)], []
    shown = shown_metrics(protocol, (figures for figures, _ in rows.values()))
    if others and not protocol.get("metrics"):
        shown = [metric for metric in shown if metric in _NEXT_TO_PUBLISHED]
    for metric in shown:
        heads.append(("", TITLES[metric]))
        columns.append(
            [_figure(row.get(metric), std and std.get(metric)) for row, std in rows.values()]
        )
    if len(heads) == 1:
        notes.append("No metrics: there are no test images, or only of one class.")
    for other in others:
        mean = other.mean if len(categories) == other.categories else None
        cells = [*map(other.figures.get, categories), mean]
        if any(cell is not None for cell in cells):
            heads.append((other.system, other.metric.removesuffix("_auroc")))
            columns.append([_figure(cell, digits=3) for cell in cells])
            notes.append(f"{other.system} ({heads[-1][1]}): {other.source}.")
    notes += [f"Data: {each['note']}." for each in protocol["data"].values() if "note" in each]
    return heads, list(map(list, zip(*columns, strict=True))), list(dict.fromkeys(notes))


def _figure(value: float | None, deviation: float | None = None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
