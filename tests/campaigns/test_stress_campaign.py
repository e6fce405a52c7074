"""Short form of the campaign on numbers under stress."""

import pytest
import stress
from campaign import Options, run


@pytest.mark.parametrize("title", stress.TRIALS)
def test_results_are_finite_or_refused(title, tmp_path):
    row = run(title, stress.TRIALS[title], Options(tmp_path))
    assert row.lost == []
    assert row.survived > 0
