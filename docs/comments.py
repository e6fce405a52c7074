"""Comments in source files, as the documentation of fields and constants."""

import io
import pathlib
import tokenize


class Comments:
    """The comments of a file."""

    def __init__(self, file: pathlib.Path):
        self._behind: dict[int, str] = {}  # by line
        self._alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            if token.type == tokenize.COMMENT:
                is_alone = token.line.lstrip().startswith("#")
                lines = self._alone if is_alone else self._behind
                lines[token.start[0]] = token.string.lstrip("# ")

    def of(self, first: int, last: int) -> str:
        """Comment of the lines from `first` to `last`: behind the last one, or else above."""
        if last in self._behind:
            return self._behind[last]
        lines: list[str] = []
        while (first := first - 1) in self._alone:
            lines.insert(0, self._alone[first])
        return " ".join(lines)
