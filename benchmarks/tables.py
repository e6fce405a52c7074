"""Writes the tables of figures in the README and docs/ from the files in `benchmarks/results/`.

    python benchmarks/tables.py            # rewrites every table
    python benchmarks/tables.py --check    # exits with 1 and names each table that differs

A file with a field `page` describes one table of that page, between the markers
`<!-- table: NAME -->` and `<!-- end of table: NAME -->`, where NAME is the file's name without
`.json`. Its fields:

    page       path of the page, from the root of the repository
    command    how the figures were measured
    commit     the commit that was measured, or the one that added the figures
    machine    processor and accelerator, or "unknown"
    seeds      seeds of the runs
    data       data sets and numbers of images
    columns    titles by key, in order
    rows       cells by key: a number, [mean, deviation], or text. A missing cell is empty.
    table      optional: name of a table that several files share, in the order of their names;
               their pages and columns are the same.
    benchmarks optional: results of `run.py`. A row that names a `benchmark` and a `ratio` takes
               its number from there, and is left out if it was not measured.
"""

import argparse
import json
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
PROVENANCE = ("command", "commit", "machine", "seeds", "data")
_TABLE = re.compile(r"<!-- table: (\S+) -->.*?<!-- end of table: \1 -->\n?", re.S)
_FIGURE = re.compile(r"\|[ *]*-?\d*\.\d+[ *]*(±|\|)")


def read_tables(root: pathlib.Path = ROOT) -> dict[str, dict]:
    """Returns the tables by name: the content of a file, or of all files that share a table.

    Raises:
      ValueError: a file lacks one of the fields that say how its figures were measured, or has
        another page or other columns than a file that shares its table.
    """
    tables: dict[str, dict] = {}
    for file in sorted((root / "benchmarks/results").glob("*.json")):
        table = json.loads(file.read_text())
        if "page" not in table:
            continue  # a raw result that a table or page links to
        for field in PROVENANCE:
            if not table.get(field):
                raise ValueError(f'{file.name} has no "{field}". Add it, or write "unknown".')
        name = table.get("table", file.stem)
        shared = tables.setdefault(name, table | {"rows": [], "sources": {}})
        if any(shared[field] != table[field] for field in ("page", "columns")):
            raise ValueError(f"{file.name} and the table {name} differ in page or columns.")
        shared["rows"] += table["rows"]
        shared["sources"][file.stem] = table["seeds"]
    return tables


def format_cell(value: float | list[float] | str | None) -> str:
    """Returns a cell's text: `.954`, `.954 ± .004`, `1,200`, the text, or nothing for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    numbers = value if isinstance(value, list) else [value]
    return " ± ".join(re.sub(r"^(-?)0\.", r"\1.", f"{number:.3f}") for number in numbers)


def render(name: str, table: dict) -> str:
    """Returns a table as Markdown between its markers, with a line on each file it comes from."""
    columns = table["columns"]
    lines = [
        f"| {' | '.join(columns.values())} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    for row in table["rows"]:
        cells = dict(row)
        if "ratio" in row:
            measured = table["benchmarks"].get(row["benchmark"], {"ratios": {}})["ratios"]
            if row["ratio"] not in measured:
                continue
            cells["ratio"] = f"{measured[row['ratio']]:.3g}"
        lines.append(f"| {' | '.join(format_cell(cells.get(key)) for key in columns)} |")
    folder = pathlib.PurePosixPath(table["page"]).parent
    notes = []
    for source, seeds in table.get("sources", {name: table["seeds"]}).items():
        path = os.path.relpath(f"benchmarks/results/{source}.json", folder)
        notes.append(f"Seeds: {seeds}. Command, commit, machine and data: [{source}.json]({path}).")
    body = "\n".join([*lines, "", *notes])
    return f"<!-- table: {name} -->\n{body}\n<!-- end of table: {name} -->\n"


def rewrite(text: str, page: str, tables: dict[str, dict]) -> tuple[str, list[str]]:
    """Returns a page with its tables rendered again, and a message for each that differed.

    Args:
      text: the page as it is.
      page: its path from the root of the repository.
      tables: all tables, from `read_tables`.
    """
    problems = []
    expected = {name: render(name, table) for name, table in tables.items()}
    here = {name for name, table in tables.items() if table["page"] == page}

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in here:
            problems.append(f"{page}: the table {name} has no file benchmarks/results/{name}.json.")
            return match[0]
        if match[0] != expected[name]:
            problems.append(
                f"{page}: the table {name} differs from benchmarks/results/{name}.json."
            )
        return expected[name]

    rewritten = _TABLE.sub(replace, text)
    for name in sorted(here - set(_TABLE.findall(text))):
        problems.append(f"{page}: the table {name} was not found. Add its two markers.")
    for line in _TABLE.sub("", text).splitlines():
        if _FIGURE.search(line):
            problems.append(f"{page}: figures without a file in benchmarks/results: {line}")
    return rewritten, problems


def main(argv: list[str] | None = None, root: pathlib.Path = ROOT) -> int:
    """Rewrites or checks all pages; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="Write nothing; exit with 1 if a table differs."
    )
    args = parser.parse_args(argv)
    tables = read_tables(root)
    found = []
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        page, text = file.relative_to(root).as_posix(), file.read_text()
        rewritten, problems = rewrite(text, page, tables)
        if not args.check and rewritten != text:
            file.write_text(rewritten)
            # What differed is now written; what is left must be mended by hand.
            problems = rewrite(rewritten, page, tables)[1]
        found += problems
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
