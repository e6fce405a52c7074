"""Tables of the configuration's fields, from the sources: names, defaults and comments."""

import ast
import pathlib
from collections.abc import Iterator

from comments import Comments

_PACKAGE = pathlib.Path(__file__).parent.parent / "fastflow_jax"
_SECTIONS = {"default": "", "_data": "data", "_augment": "augment", "_train": "train"}
_SECTIONS |= {"_function": "function"}  # of functions in config.py
Row = tuple[str, str, str]  # name, default, description


def rows() -> dict[str, list[Row]]:
    """Fields by the title of their table."""
    source = _Source(_PACKAGE / "config.py")
    found: dict[str, list[Row]] = {"All detectors": []}
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in _SECTIONS:
            found["All detectors"] += _assigned(source, node, _SECTIONS[node.name])
    for file in sorted(_PACKAGE.glob("detectors/**/*.py")):
        found |= _of_detector(_Source(file))
    return {title: table for title, table in found.items() if table}


def tables() -> str:
    """The tables in Markdown."""
    parts = []
    for title, table in rows().items():
        parts += [f"### {title}", "", "| field | default | |", "|---|---|---|"]
        parts += [f"| `{n}` | `{d}` | {_escaped(t)} |" for n, d, t in table]
        parts.append("")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


class _Source:
    """A file, and the comments in it."""

    def __init__(self, path: pathlib.Path):
        self.tree, self.comments = ast.parse(path.read_text()), Comments(path)


def _default(value: ast.expr) -> str:
    """The default as text: `None` for one that `fill` sets."""
    is_type = isinstance(value, ast.Name)
    if is_type or (isinstance(value, ast.Call) and ast.unparse(value.func) == "placeholder"):
        return "None"
    return "{}" if ast.unparse(value) == "ConfigDict()" else ast.unparse(value)


def _assigned(source: _Source, function: ast.FunctionDef, section: str) -> Iterator[Row]:
    """Fields that a function assigns, as in `c.seed = 0`."""
    for node in function.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name = ast.unparse(node.targets[0]).partition(".")[2]
        is_call = isinstance(node.value, ast.Call)
        if is_call and not ast.unparse(node.value).startswith("placeholder") and name != "variants":
            continue  # a section
        text = source.comments.of(node.lineno, node.end_lineno or node.lineno)
        yield f"{section}.{name}".strip("."), _default(node.value), text


def _of_detector(source: _Source) -> dict[str, list[Row]]:
    """Fields of the detector that a file defines by `METHOD = Method(...)`, if any."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD":
            assert isinstance(node.value, ast.Call)
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            title, fields = given["title"], given.get("fields")
            assert isinstance(title, ast.Constant)
            if isinstance(fields, ast.Dict):
                return {str(title.value): list(_in_dict(source, fields, ""))}
    return {}


def _in_dict(source: _Source, node: ast.Dict, prefix: str) -> Iterator[Row]:
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant)
        name = f"{prefix}{key.value}"
        if isinstance(value, ast.Dict):
            yield from _in_dict(source, value, f"{name}.")
        else:
            yield name, _default(value), source.comments.of(key.lineno, value.end_lineno or 0)
