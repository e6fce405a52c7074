"""The campaign of hostile input, in its short form."""

import fuzz
import pytest
from campaign import Options, Skipped, run


@pytest.fixture(scope="module", autouse=True)
def _end_of_the_child():
    yield
    fuzz.close()


@pytest.mark.parametrize("title", fuzz.TRIALS)
def test_hostile_input_is_survived(title, tmp_path):
    try:
        row = run(title, fuzz.TRIALS[title], Options(tmp_path))
    except Skipped as reason:
        pytest.skip(str(reason))
    assert row.lost == []
    assert row.survived > 0
