"""Tables of the report on kinds of defects and on defects by size."""

from collections.abc import Mapping, Sequence

from fastflow_jax.report.table import TITLES

Cells = tuple[list[str], list[list[str]]]  # heads (the first is empty) and rows


def kind_cells(kinds: Sequence[Mapping]) -> Cells | None:
    """Formats the image metrics of each kind of defect, with 95 % intervals.

    Args:
      kinds: `evaluate.Details.kinds`; columns that all rows lack are left out.

    Returns:
      Heads and rows; None without kinds.
    """
    if not kinds:
        return None
    columns = {
        "": [row["kind"] or "all kinds" for row in kinds],
        "images": [f"{row['images']:,}" for row in kinds],
        "found": [None if row["found"] is None else f"{row['found']:,}" for row in kinds],
        **{
            TITLES[m]: [_with_interval(row[m]) for row in kinds]
            for m in ("image_auroc", "image_ap")
        },
        **{TITLES[m]: [_figure(row[m]) for row in kinds] for m in ("aupimo", "spro_05")},
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    rows = [[cell or "–" for cell in row] for row in zip(*shown.values(), strict=True)]
    return list(shown), rows


def size_cells(sizes: Sequence[Mapping]) -> Cells | None:
    """Formats the share of defects that the pixel threshold finds, for defects of similar size.

    Args:
      sizes: `evaluate.Details.sizes`.

    Returns:
      Heads and rows; None without sizes.
    """
    if not sizes:
        return None
    heads = ["share of the image", "defects", "found", "95 % interval", "overlap"]
    rows = [
        [
            f"{100 * row['low']:g} to {100 * row['high']:g} %",
            f"{row['regions']:,}",
            f"{row['found']:,} ({100 * row['found'] / row['regions']:.0f} %)",
            " to ".join(f"{100 * end:.0f}" for end in row["interval"]) + " %",
            f"{100 * row['overlap']:.0f} %",
        ]
        for row in sizes
    ]
    return heads, rows


def _with_interval(figure: Mapping) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.3f} ({low:.3f} to {high:.3f})"


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
