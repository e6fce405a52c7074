"""Tables of figures are those of the result files; differences are found and named."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import tables

TABLE = {
    "page": "docs/speed.md",
    "command": "python benchmarks/inference.py",
    "commit": "abc1234",
    "machine": "a processor",
    "seeds": "0",
    "data": "random images",
    "columns": {"name": "AUROC", "image": "image", "source": "source"},
    "rows": [
        {"name": "ours", "image": [0.954, 0.004]},
        {"name": "theirs", "image": 1.0, "source": "their README"},
    ],
}
EXPECTED = """\
<!-- table: one -->
| AUROC | image | source |
|---|---:|---:|
| ours | .954 ± .004 |  |
| theirs | 1.000 | their README |

Seeds: 0. Command, commit, machine and data: [one.json](../benchmarks/results/one.json).
<!-- end of table: one -->
"""
EMPTY = "<!-- table: one -->\n<!-- end of table: one -->\n"


@pytest.fixture
def root(tmp_path):
    """A repository with one table file and a page whose table has not been written yet."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    write_table(tmp_path)
    (tmp_path / "benchmarks/results/raw.json").write_text('{"curve": []}')
    (tmp_path / "README.md").write_text("# Name\n")
    (tmp_path / "docs/speed.md").write_text(f"# Speed\n\n{EMPTY}\nText.\n")
    return tmp_path


def write_table(root, **changes):
    (root / "benchmarks/results/one.json").write_text(json.dumps(TABLE | changes))


def test_tables_of_this_repository_match_their_files(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_table_is_written_and_then_matches(root):
    assert tables.main([], root) == 0
    page = (root / "docs/speed.md").read_text()
    assert page == f"# Speed\n\n{EXPECTED}\nText.\n"
    assert tables.main(["--check"], root) == 0
    assert tables.main([], root) == 0
    assert (root / "docs/speed.md").read_text() == page


@pytest.mark.parametrize("edited", ["page", "file"])
def test_check_names_a_table_that_differs_and_writes_nothing(root, capsys, edited):
    tables.main([], root)
    page = root / "docs/speed.md"
    if edited == "page":
        page.write_text(page.read_text().replace(".954", ".955"))
    else:
        write_table(root, rows=[{"name": "ours", "image": [0.955, 0.004]}])
    before = page.read_text()
    assert tables.main(["--check"], root) == 1
    message = "docs/speed.md: the table one differs from benchmarks/results/one.json."
    assert message in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("# Speed\n", "the table one was not found. Add its two markers."),
        (EMPTY + EMPTY.replace("one", "two"), "the table two has no file"),
        (EMPTY + "\n| ours | .954 |\n", "figures without a file in benchmarks/results"),
        (EMPTY + "\n| ours | **.954 ± .004** |\n", "figures without a file in benchmarks/results"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_faults_that_cannot_be_written_are_named(root, capsys, page, message, arguments):
    (root / "docs/speed.md").write_text(page)
    assert tables.main(arguments, root) == 1
    assert message in capsys.readouterr().err


def test_tables_of_words_need_no_file(root):
    (root / "README.md").write_text("| command | effect |\n|---|---|\n| `--rate=0.01` | 1 % |\n")
    assert tables.main([], root) == 0


def test_files_share_a_table(root):
    part = {"table": "one", "columns": {"name": "case", "tried": "tried"}, "seeds": "1"}
    write_table(root, **part, rows=[{"name": "first", "tried": 1200}])
    second = root / "benchmarks/results/two.json"
    second.write_text(json.dumps(TABLE | part | {"seeds": "2", "rows": [{"name": "second"}]}))
    assert tables.main([], root) == 0
    text = (root / "docs/speed.md").read_text()
    assert "| first | 1,200 |\n| second |  |\n" in text
    assert "Seeds: 1. Command, commit, machine and data: [one.json]" in text
    assert "Seeds: 2. Command, commit, machine and data: [two.json]" in text
    second.write_text(json.dumps(TABLE | part | {"columns": {"name": "another"}}))
    with pytest.raises(ValueError, match=r"two\.json and the table one differ in page or columns"):
        tables.main(["--check"], root)


@pytest.mark.parametrize("field", tables.PROVENANCE)
def test_a_file_must_say_how_its_figures_were_measured(root, field):
    write_table(root, **{field: ""})
    with pytest.raises(ValueError, match=f'one.json has no "{field}"'):
        tables.main(["--check"], root)


def test_ratios_come_from_the_benchmarks_of_the_file(root):
    rows = [
        {"name": "one image", "benchmark": "inference.py", "ratio": "batch1"},
        {"name": "not measured", "benchmark": "inference.py", "ratio": "batch2"},
        {"name": "not run", "benchmark": "memory.py", "ratio": "batch1"},
    ]
    columns = {"name": "peer over ours", "ratio": "ratio"}
    write_table(
        root, columns=columns, rows=rows, benchmarks={"inference.py": {"ratios": {"batch1": 2.126}}}
    )
    assert tables.main([], root) == 0
    page = (root / "docs/speed.md").read_text()
    assert "| one image | 2.13 |" in page
    assert "not measured" not in page
    assert "not run" not in page
