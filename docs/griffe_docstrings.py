"""Extension of griffe: forms of documentation in this package that it does not know.

- The comment of a field or constant is its documentation: behind its last line, or else on the
  lines directly above.
- `height, width: of the image` in a section documents both.
- A session, `>>> f(1)`, may be outside a section of examples.
- A linen module is created with its fields as arguments.
"""

import pathlib
import re
import sys

from griffe import (
    Attribute,
    Class,
    Docstring,
    Extension,
    Function,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from comments import Comments

# An entry of several names, with its further lines, which are indented more.
_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)
_SESSION = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class Docstrings(Extension):
    """Reads comments of fields, entries of several names, and sessions."""

    def __init__(self) -> None:
        super().__init__()
        self._comments: dict[pathlib.Path, Comments] = {}

    def on_instance(self, *, obj: Object, **_) -> None:
        """Called by griffe for each object with a docstring or without."""
        if obj.docstring is not None:
            text = _SEVERAL.sub(_apart, obj.docstring.value)
            obj.docstring.value = _SESSION.sub(r"```pycon\n\g<0>\n```", text)

    def on_class_members(self, *, cls: Class, **_) -> None:
        """Called by griffe for each class, after its members."""
        if any(str(base) == "nn.Module" for base in cls.bases) and "__init__" not in cls.members:
            kind = ParameterKind.positional_or_keyword
            fields = (m for m in cls.members.values() if isinstance(m, Attribute) and m.annotation)
            arguments = [
                Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value)
                for f in fields
            ]
            cls.set_member("__init__", Function("__init__", parameters=Parameters(*arguments)))

    def on_attribute_instance(self, *, attr: Attribute, **_) -> None:
        """Called by griffe for each attribute."""
        if attr.docstring or not attr.lineno or not attr.endlineno:
            return
        file = pathlib.Path(str(attr.filepath))
        if file not in self._comments:
            self._comments[file] = Comments(file)
        if text := self._comments[file].of(attr.lineno, attr.endlineno):
            attr.docstring = Docstring(text, lineno=attr.lineno, parent=attr)


def _apart(match: re.Match[str]) -> str:
    """An entry of several names as one entry for each."""
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
