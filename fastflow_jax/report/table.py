"""Results as a table of plain text."""

from collections.abc import Mapping

TITLES = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "image_f1": "image F1",
    "image_ap": "image AP",
    "pixel_ap": "pixel AP",
}


def format_table(results: Mapping) -> str:
    """A row a category and their mean, from what stands in `results.json`.

    With several seeds the mean's deviation over the seeds stands behind it. Columns that the data
    cannot give are left out.
    """
    columns = [
        m for m in TITLES if any(row[m] is not None for row in results["categories"].values())
    ]
    rows = [["", *(TITLES[m] for m in columns)]]
    rows += [
        [name, *(_figure(row[m]) for m in columns)] for name, row in results["categories"].items()
    ]
    deviation = results["std"] or dict.fromkeys(columns)
    rows.append(["mean", *(_figure(results["mean"][m], deviation[m]) for m in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * len(line(rows[0]))
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:-1]), rule, line(rows[-1])])


def _figure(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")
