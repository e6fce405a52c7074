"""Results as a table: plain text, Markdown and CSV."""

import csv
import io
from collections.abc import Mapping
from typing import NamedTuple

from fastflow_jax.report.published import published

TITLES = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "image_f1": "image F1",
    "image_ap": "image AP",
    "pixel_ap": "pixel AP",
}
_BESIDE_OTHERS = ("image_auroc", "pixel_auroc", "aupro")  # figures that others published


class _Column(NamedTuple):
    system: str  # whose figures; "" for the run's own
    title: str
    cells: list[str]  # of the rows; the last is the mean's


class _Table(NamedTuple):
    rows: list[str]  # categories and their mean, or variants
    columns: list[_Column]
    notes: list[str]  # sources, and what is to be known of the data


def format_table(results: Mapping) -> str:
    """Plain text, from what stands in `results.json`.

    A row a category and their mean, with several seeds the mean's deviation over the seeds, and
    beside them what others published on the same data and backbone; or a row a variant. Columns
    that the data cannot give are left out.
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
    """The same as heads, of which the first is empty, rows and notes."""
    table = _table(results)
    heads = ["", *(f"{c.system} {c.title}".strip() for c in table.columns)]
    columns = [column.cells for column in table.columns]
    return heads, [list(row) for row in zip(table.rows, *columns, strict=True)], table.notes


def format_markdown(results: Mapping) -> str:
    """The same as a Markdown table."""
    heads, body, notes = table_cells(results)
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *body]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def format_csv(results: Mapping) -> str:
    """The same as comma-separated values; notes are in a last column, each row's the same."""
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
        for metric in (_BESIDE_OTHERS if others else TITLES)
        if any(figures[metric] is not None for figures, _ in rows.values())
    ]
    notes = [] if metrics else ["No figures: there are no test images, or they are all of a kind."]
    columns = [
        _Column("", TITLES[m], [_figure(row[m], std and std[m]) for row, std in rows.values()])
        for m in metrics
    ]
    for other in others:
        means = other.mean if len(categories) == other.categories else None
        cells = [*map(other.figures.get, categories), means]
        if any(cell is not None for cell in cells):
            title = other.metric.removesuffix("_auroc")
            columns.append(_Column(other.system, title, [_published(cell) for cell in cells]))
            notes.append(f"{other.system} ({title}): {other.source}.")
    data = protocol["data"].values()
    notes += [f"Data: {each['note']}." for each in data if "note" in each]
    return _Table(list(rows), columns, list(dict.fromkeys(notes)))


def _figure(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")


def _published(value: float | None) -> str:
    """With as many places as were published."""
    return "-" if value is None else f"{value:.3f}"
