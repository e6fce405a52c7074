"""The command line in this process."""

import contextlib
import io
import sys
from collections.abc import Sequence

from absl.testing import flagsaver


def run(words: Sequence[str]) -> None:
    """Runs `fastflow-jax` with arguments. A failure must be one message and a status above 0.

    Raises:
      AssertionError: it is not.
    """
    from fastflow_jax import main

    argv, errors = sys.argv, io.StringIO()
    sys.argv = [main.__file__, *words]  # config_flags reads it
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stderr(errors):
            try:
                status = main._run(main._parse(sys.argv))
            except SystemExit as end:
                status = end.code
    finally:
        sys.argv = argv
    text = errors.getvalue()
    assert isinstance(status, int), f"the status is {status!r}: {text}"
    assert "Traceback" not in text, text
    assert status in (0, 1, 3, 4) or text.count("error: ") == 1, f"status {status}: {text!r}"
