"""Packaged configurations by name."""

import pathlib

import pytest

from fastflow_jax.cli import configs
from fastflow_jax.errors import InputError

DIRECTORY = pathlib.Path(__file__).parents[2] / "configs"


def test_a_name_finds_the_packaged_file_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mvtec").mkdir()  # a directory is no configuration
    assert configs.find("mvtec") == f"{DIRECTORY}/mvtec.py"
    assert configs.find("ablations:steps/elpv/mono") == f"{DIRECTORY}/ablations.py:steps/elpv/mono"
    assert configs.names() == sorted(file.stem for file in DIRECTORY.glob("*.py"))


@pytest.mark.parametrize("name", ["mvtec", "mvtec.py", "configs/mvtec.py"])
def test_an_existing_file_takes_precedence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert configs.find(name) == name
    assert configs.find(f"{name}:bottle,screw") == f"{name}:bottle,screw"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("mvtek:bottle", "Did you mean --config=mvtec:bottle?"),
        ("configs/mvtec.py:bottle", "Did you mean --config=mvtec:bottle?"),
        ("somewhere/else.py", "Pass an existing file"),
    ],
)
def test_a_missing_configuration_is_reported_with_similar_names(value, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        configs.find(value)
    file = value.partition(":")[0]
    assert str(error.value).startswith(f"The configuration {file} was not found in {tmp_path}. ")
    assert hint in str(error.value)
    assert "packaged configuration: ablations, aebad, btad" in str(error.value)


@pytest.mark.parametrize(
    "words", [["--config=folder"], ["--config", "folder"], ["-config", "folder"]]
)
def test_names_are_found_in_arguments(words):
    file, rest = str(DIRECTORY / "folder.py"), ["--config.seed=folder", "--workdir", "demo"]
    found = configs.find_all(["main.py", *words, *rest])
    assert found[0] == "main.py"
    assert "=".join(found[1 : 1 + len(words)]) == f"{words[0].partition('=')[0]}={file}"
    assert found[1 + len(words) :] == rest
