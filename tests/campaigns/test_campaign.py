"""The frame of campaigns counts outcomes, and writes the file that the table is made of."""

import json

import campaign


def mixed(options):
    options.figures["form"] = "long" if options.long else "short"
    yield None
    yield f"case 1 of {options.number(short=2, long=3)}, seed {options.seed}"


def impossible(options):
    raise campaign.Skipped("there is no disk")
    yield


def test_outcomes_are_counted_and_losses_are_kept(tmp_path):
    row = campaign.run("mixed", mixed, campaign.Options(tmp_path, seed=7))
    assert (row.tried, row.survived, row.lost) == (2, 1, ["case 1 of 2, seed 7"])


def test_the_script_writes_a_row_per_trial_that_ran(tmp_path, capsys):
    file = tmp_path / "results.json"
    words = ["--long", f"--out={file}"]
    trials = {"mixed": mixed, "impossible": impossible}
    assert campaign.main("About.", trials, data="none", argv=words) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert row.pop("seconds") >= 0
    assert row.pop("commit")
    assert row == {
        **{"what": "mixed", "tried": 2, "survived": 1, "lost": 1},
        **{"losses": ["case 1 of 3, seed 0"], "form": "long"},
    }
    out, err = capsys.readouterr()
    assert "impossible: skipped: there is no disk" in out
    assert "mixed: LOST: case 1 of 3, seed 0" in err


def test_a_part_of_the_trials_replaces_its_rows(tmp_path):
    file = tmp_path / "results.json"
    trials = {"first": mixed, "second": mixed}
    for words in ([], ["--only=second", "--long"]):
        campaign.main("About.", trials, data="none", argv=[*words, f"--out={file}"])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["what"], row["form"]) for row in rows] == [("first", "short"), ("second", "long")]
