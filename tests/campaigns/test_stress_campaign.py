"""Short form of the campaign on numbers under stress."""

import pytest
import stress
from campaign import Options, Skipped, run


@pytest.mark.parametrize("title", stress.TRIALS)
def test_results_are_finite_or_refused(title, tmp_path):
    try:
        row = run(title, stress.TRIALS[title], Options(tmp_path))
    except Skipped as reason:
        pytest.skip(str(reason))
    assert row.lost == []
    assert row.survived > 0
