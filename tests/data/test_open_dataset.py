"""Selection of data sets, and the modules that it imports."""

import subprocess
import sys

import pytest

from fastflow_jax.data import DATASETS, open_dataset
from fastflow_jax.errors import InputError


@pytest.mark.parametrize(("name", "says"), [("elvp", "is 'elvp'"), (None, "is not set")])
def test_an_unknown_name_lists_the_known(name, says, data_config):
    with pytest.raises(InputError, match=rf"data.name {says}.*{', '.join(DATASETS)}"):
        open_dataset(data_config(name))


IMPORTED = """
import sys
from ml_collections import ConfigDict
from fastflow_jax.data import open_dataset
unset = dict.fromkeys(("root", "manifest", "dir", "exclude"))
config = ConfigDict({"name": NAME, "category": "brick", **unset})
try:
    open_dataset(config)
except ValueError:
    pass
print([name for name in sys.argv[1:] if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("name", "heavy"),
    [
        ("folder", ["tensorflow", "torch", "tensorflow_datasets", "grain", "skimage"]),
        ("synthetic", ["tensorflow", "torch", "tensorflow_datasets", "grain", "skimage"]),
        ("elpv", ["tensorflow", "torch"]),
    ],
)
def test_opening_imports_only_what_it_needs(name, heavy):
    program = IMPORTED.replace("NAME", repr(name))
    command = [sys.executable, "-W", "error", "-c", program, *heavy]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
