"""Files around the package agree with it and with each other."""

import pathlib
import re
import tomllib

import pytest

import fastflow_jax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI = (ROOT / ".ci/run").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_citation_has_the_version_of_the_package():
    version = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert version == [fastflow_jax.__version__]


def test_workflows_run_parts_that_exist():
    yaml = pytest.importorskip("yaml", reason="reads workflow files")
    parts = set(re.findall(r"^(\w+)\(\) \{", CI, re.M))
    called = set()
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for job in jobs.values():
            for step in job["steps"]:
                words = step.get("run", "").split()
                if words[:1] == [".ci/run"]:
                    called |= {*words[1:]} - {"${{", "matrix.part", "}}"}
            called |= {*job.get("strategy", {}).get("matrix", {}).get("part", [])}
    assert {"demo", "lint", "tests", "package", "plain", "docs"} <= called <= parts


def test_the_quick_start_of_ci_is_a_line_of_the_readme():
    (pattern,) = re.findall(r"sed -n 's/(.*)/\\1/p' README\.md", CI)
    pattern = pattern.replace(r"\(", "(").replace(r"\)", ")")
    found = re.findall(pattern, (ROOT / "README.md").read_text(), re.M)
    assert found == ["fastflow-jax train --config=demo"]


def test_extras_of_the_page_are_those_of_the_project():
    table = (ROOT / "docs/command_line.md").read_text().partition("## What an installation")[2]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \| ", table, re.M)))
    assert set(named) - {"pip"} >= set(PROJECT["optional-dependencies"])
