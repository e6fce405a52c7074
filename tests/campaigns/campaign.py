"""Frame of the campaigns: options, outcomes, and results for the table in docs/trust.md.

A campaign is a module of this directory that tries many cases, some of them harmful, and counts
those that survived. It has a dictionary of trials. The key of a trial is its row in the table. A
trial is a generator that yields, for each case, None if it survived, or a line that states what was
lost and how to repeat it:

    def cut_short(options: Options) -> Iterator[str | None]:
        rng = np.random.default_rng(options.seed)
        for _ in range(options.number(short=20, long=10_000)):
            file = cut(image, rng.integers(len(image)))
            yield None if is_refused(file) else f"a PNG of {len(file)} bytes was read"

    TRIALS = {"image files, cut short": cut_short}

    if __name__ == "__main__":
        sys.exit(campaign.main(__doc__, TRIALS))

The script runs the short form, or the long form with --long:

    python tests/campaigns/faults.py --long --out benchmarks/results/campaign_faults.json

A test runs the short form of each trial, in a module of its own, `test_<campaign>_campaign.py`:

    @pytest.mark.parametrize("title", TRIALS)
    def test_nothing_is_lost(title, tmp_path):
        row = campaign.run(title, TRIALS[title], Options(tmp_path))
        assert row.lost == [] and row.survived > 0

A trial raises `Skipped` where it cannot run, and then has no row. It may add figures of its own to
`options.figures`, which are stored with its row.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from outcome import commit, describe_machine, versions, write_result

PAGE, TABLE = "docs/trust.md", "campaigns"
COLUMNS = {"what": "what was done", "tried": "tried", "survived": "survived", "lost": "lost"}


class Skipped(Exception):
    """The trial cannot run here, for the reason in the message."""


@dataclasses.dataclass
class Options:
    """How much is tried, and where."""

    folder: pathlib.Path  # empty directory of the trial
    seed: int = 0
    long: bool = False
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the trial, for its row

    def number(self, *, short: int, long: int) -> int:
        """Number of cases to try."""
        return long if self.long else short


Trial = Callable[[Options], Iterator[str | None]]


@dataclasses.dataclass
class Row:
    """Outcome of a trial."""

    what: str
    survived: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)  # a line per case
    seconds: float = 0.0
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tried(self) -> int:
        return self.survived + len(self.lost)

    def plain(self) -> dict[str, Any]:
        """The row of the file of results."""
        counts = {"tried": self.tried, "survived": self.survived, "lost": len(self.lost)}
        about = {"losses": self.lost} if self.lost else {}
        return {"what": self.what} | counts | about | {"seconds": self.seconds} | self.figures


def run(title: str, trial: Trial, options: Options) -> Row:
    """Runs a trial; losses are printed as they occur.

    Raises:
      Skipped: the trial cannot run here.
    """
    row, start = Row(title, figures=options.figures), time.perf_counter()
    for outcome in trial(options):
        if outcome is None:
            row.survived += 1
        else:
            row.lost.append(outcome)
            print(f"{title}: LOST: {outcome}", file=sys.stderr, flush=True)
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def main(
    description: str,
    trials: Mapping[str, Trial],
    *,
    data: str,
    packages: tuple[str, ...] = ("jax",),
    argv: list[str] | None = None,
) -> int:
    """Runs the campaign that the arguments select; returns 1 if anything was lost.

    Args:
      description: of the campaign.
      trials: by their row in the table.
      data: what the cases are made of.
      packages: whose versions the file of results states.
      argv: arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="Run the long form.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all random choices.")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="Run the trials whose row contains one of these."
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="Write the results to this file; with --only, keep its other rows.",
    )
    args = parser.parse_args(argv)
    rows = []
    for title, trial in trials.items():
        if not any(text in title for text in args.only):
            continue
        with tempfile.TemporaryDirectory(prefix="campaign_") as folder:
            options = Options(pathlib.Path(folder), args.seed, args.long)
            try:
                row = run(title, trial, options)
            except Skipped as reason:
                print(f"{title}: skipped: {reason}", flush=True)
                continue
        rows.append(row)
        print(f"{title}: {row.tried} tried, {len(row.lost)} lost, {row.seconds} s", flush=True)
    words = sys.argv[1:] if argv is None else argv
    script = pathlib.Path(sys.argv[0]).name
    about = {"page": PAGE, "table": TABLE, "command": f"python tests/campaigns/{script} "}
    about["command"] += shlex.join(words)
    about |= {"commit": commit(), "machine": describe_machine(), "versions": versions(*packages)}
    about |= {"seeds": str(args.seed), "data": data, "columns": COLUMNS}
    known = {}
    if args.only != [""] and args.out and args.out.exists():
        known = {row["what"]: row for row in json.loads(args.out.read_text())["rows"]}
    known |= {row.what: row.plain() | {"commit": commit()} for row in rows}
    order = [known[title] for title in trials if title in known]
    write_result(args.out, about | {"rows": order})
    return int(any(row.lost for row in rows))
