"""Results as a table: plain text, Markdown and CSV."""

import csv
import io
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

TITLES = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "image_f1": "image F1",
    "image_ap": "image AP",
    "pixel_ap": "pixel AP",
}
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


class _Column(NamedTuple):
    system: str  # "" for the results of the run
    title: str
    cells: list[str]  # one per row


class _Table(NamedTuple):
    rows: list[str]  # categories and "mean", or variants
    columns: list[_Column]
    notes: list[str]  # sources and remarks on the data


def format_table(results: Mapping) -> str:
    """Formats the content of `results.json` as plain text.

    The table has a row per category and their mean, with its standard deviation over several seeds,
    or a row per variant. Published results for the same data and backbone have columns of their
    own. Metrics that are None in all rows are omitted.
    """
    table = _table(results)
    heads = [("", ""), *((c.system, c.title) for c in table.columns)]
    columns = [table.rows, *(c.cells for c in table.columns)]
    widths = [max(map(len, (*h, *cells))) for h, cells in zip(heads, columns, strict=True)]

    def line(cells):
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    head = [line(row) for row in zip(*heads, strict=True) if any(row)]
    body = [line(row) for row in zip(*columns, strict=True)]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    if "mean" in table.rows:
        body.insert(-1, rule)
    notes = ["", *table.notes] if table.notes else []
    return "\n".join([*head, rule, *body, *notes])


def table_cells(results: Mapping) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the heads (the first is empty), rows and notes of the table of `format_table`."""
    table = _table(results)
    heads = ["", *(f"{c.system} {c.title}".strip() for c in table.columns)]
    columns = [column.cells for column in table.columns]
    return heads, [list(row) for row in zip(table.rows, *columns, strict=True)], table.notes


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


def _table(results: Mapping) -> _Table:
    protocol, categories = results["protocol"], results["categories"]
    if results["variants"]:
        rows = {name: (each["mean"], each["std"]) for name, each in results["variants"].items()}
        others = ()
    else:
        rows = {name: (figures, None) for name, figures in categories.items()}
        rows["mean"] = (results["mean"], results["std"])
        others = published(protocol["dataset"], protocol["backbone"])
    metrics = [
        metric
        for metric in (_NEXT_TO_PUBLISHED if others else TITLES)
        if any(figures[metric] is not None for figures, _ in rows.values())
    ]
    notes = [] if metrics else ["No metrics: there are no test images, or only of one class."]
    columns = [
        _Column("", TITLES[m], [_figure(row[m], std and std[m]) for row, std in rows.values()])
        for m in metrics
    ]
    for other in others:
        mean = other.mean if len(categories) == other.categories else None
        cells = [*map(other.figures.get, categories), mean]
        if any(cell is not None for cell in cells):
            title = other.metric.removesuffix("_auroc")
            columns.append(_Column(other.system, title, [_figure(c, digits=3) for c in cells]))
            notes.append(f"{other.system} ({title}): {other.source}.")
    data = protocol["data"].values()
    notes += [f"Data: {each['note']}." for each in data if "note" in each]
    return _Table(list(rows), columns, list(dict.fromkeys(notes)))


def _figure(value: float | None, deviation: float | None = None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
