"""Normal images that look unusual: a section of reports, and a table of plain text."""

import base64
import pathlib
from collections.abc import Mapping
from typing import Any

from fastflow_jax.files import parse_json

_MOST_BYTES = 8 * 2**20  # of pictures in a page


def read_audit(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns what the template shows of an audit, or None without one.

    Args:
      folder: directory with `audit.json` and the pictures in `audit/`, see `runs.audit`.
    """
    file, pictures = folder / "audit.json", folder / "audit"
    if not file.exists():
        return None
    audit: dict[str, Any] = parse_json(file)
    entries, size = [], 0
    for rank, entry in enumerate(audit["ranking"][: audit["listed"]], 1):
        picture, encoded = pictures / f"{rank}.webp", None
        if picture.exists() and size < _MOST_BYTES:
            content = picture.read_bytes()
            size += len(content)
            encoded = base64.b64encode(content).decode()
        entries.append({**entry, "rank": rank, "picture": encoded})
    return {**audit, "entries": entries}


def format_audit(audit: Mapping) -> str:
    """Formats the listed images as a table of plain text."""
    n = audit["images"]
    lines = [f"{audit['name']}: {audit['listed']} of {n} normal images look most unusual", ""]
    lines.append(f"{'rank':>4}  {'share':>6}  {'deviations':>10}  image")
    for rank, entry in enumerate(audit["ranking"][: audit["listed"]], 1):
        lines.append(f"{rank:>4}  {rank / n:>6.1%}  {entry['score']:>10.1f}  {entry['name']}")
    return "\n".join(lines)
