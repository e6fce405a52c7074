"""The documentation site: strict build, complete reference, no requests to third parties.

The site is built once, and once more with errors, which takes most of the time of these tests. They
need the packages of the extra docs only, neither JAX nor conftest.py.
"""

import ast
import functools
import html.parser
import http.server
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import zlib

import pytest
from chromium import BINARY, page

import fastflow_jax

griffe = pytest.importorskip("griffe", reason="the site needs the extra docs")
pytest.importorskip("material", reason="the site needs the extra docs")

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))
# Whose `__all__` lists public names.
LISTED = "data", "detector", "export", "flows", "flows.nnx"
HOMES = "decision", "detector", "errors", "prediction"  # of the names of fastflow_jax
# Tags and attributes that make a browser load something when it opens a page.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


def build(root, site):  # without --quiet, which would hide warnings from the strict build
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def documented(site):
    """Kinds of the objects that the reference has, by name."""
    *_, content = (site / "objects.inv").read_bytes().split(b"\n", 4)
    lines = zlib.decompress(content).decode().splitlines()
    return dict(line.split()[:2] for line in lines)


@pytest.fixture(scope="module")
def package():
    extensions = griffe.load_extensions(ROOT / "docs/griffe_docstrings.py")
    return griffe.load("fastflow_jax", search_paths=[ROOT], extensions=extensions)


def public_names(package):
    """Names in `__all__`, and those that an example of a page imports from this package."""
    yield from (("fastflow_jax", name) for name in fastflow_jax.__all__)
    for module in LISTED:
        yield from ((f"fastflow_jax.{module}", str(name)) for name in package[module].exports)
    for file in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", file.read_text(), re.S | re.M):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("fastflow_jax"):
                    yield from ((node.module, name.name) for name in node.names)


def places(package, module, name):
    """Names under which the reference may have an object: as imported, or where it is defined."""
    imported = f"{module}.{name}"
    if module == "fastflow_jax" and name in fastflow_jax.__all__:  # imported on first use
        return {f"fastflow_jax.{home}.{name}" for home in HOMES}
    defined = package[imported.removeprefix("fastflow_jax.")].canonical_path
    # A module may have the name of the object that is imported from it.
    return {imported, defined, f"{defined}.{name}"}


def test_the_reference_has_every_public_name(documented, package):
    names = set(public_names(package))
    assert {("fastflow_jax", "Detector"), ("fastflow_jax.flows.nnx", "Flow")} <= names
    assert {("fastflow_jax.batch.scorer", "SCHEMA"), ("fastflow_jax.config", "default")} <= names
    missing = {f"{m}.{n}" for m, n in names if not places(package, m, n) & documented.keys()}
    assert not missing


def test_every_name_in_the_reference_has_a_docstring(documented, package):
    undocumented = set()
    for name, kind in documented.items():
        shown = package[name.removeprefix("fastflow_jax.")]
        members = shown.members.values() if kind in ("py:class", "py:module") else ()
        public = [m for m in members if not m.name.startswith("_") and m.name != "setup"]
        for each in (shown, *(m for m in public if not m.is_alias)):
            # Fields may be described in the docstring of their class instead.
            is_field = each.is_attribute and each.parent.is_class and "property" not in each.labels
            if not each.has_docstring and not is_field and each.name != "__call__":
                undocumented.add(each.path)
    assert not undocumented


def described(shown):
    """Names of the arguments and fields that the docstring of an object describes."""
    sections = shown.docstring.parse("google") if shown.has_docstring else ()
    kinds = "parameters", "attributes"
    return {entry.name for each in sections if each.kind.value in kinds for entry in each.value}


def undescribed(shown):
    """Names of the arguments of a function, or of the fields of a class, without a description.

    A method may leave the description of its arguments to the same method of a base class.
    """
    if shown.is_class:
        fields = [m for m in shown.members.values() if m.is_attribute]
        missing = {m.name for m in fields if not m.has_docstring and "property" not in m.labels}
        if "__init__" in shown.members:  # griffe adds that of a dataclass
            missing |= undescribed(shown["__init__"]) - {m.name for m in fields if m.has_docstring}
        return {name for name in missing if not name.startswith("_")} - described(shown)
    if not shown.is_function:
        return set()
    bases = shown.parent.mro() if shown.parent.is_class else ()
    known = described(shown).union(
        *(described(base.members[shown.name]) for base in bases if shown.name in base.members)
    )
    named = (p.name for p in shown.parameters if not p.kind.value.startswith("variadic"))
    return {*named} - {"self", "cls"} - known


def test_every_field_and_argument_in_the_reference_is_described(documented, package):
    missing = set()
    for name in documented:
        shown = package[name.removeprefix("fastflow_jax.")]
        shown = shown.final_target if shown.is_alias else shown
        missing |= {f"{shown.path}: {each}" for each in undescribed(shown)}
    assert not missing


def test_a_field_or_argument_without_a_description_is_found(tmp_path):
    (tmp_path / "example.py").write_text(
        "class Base:\n"
        "  def run(self, image: int):\n"
        "    '''Runs.\n\n    Args:\n      image: the image.\n    '''\n\n"
        "class Shown(Base):\n"
        "  '''Shown.\n\n  Attributes:\n    a: described.\n  '''\n\n"
        "  a: int\n"
        "  b: int  # described\n"
        "  c: int\n\n"
        "  def run(self, image, size):\n"
        "    '''Runs.'''\n"
    )
    extensions = griffe.load_extensions(ROOT / "docs/griffe_docstrings.py")
    shown = griffe.load("example", search_paths=[tmp_path], extensions=extensions)["Shown"]
    assert undescribed(shown) == {"c"}
    assert undescribed(shown["run"]) == {"size"}


def test_the_signature_of_a_linen_module_has_its_fields(package):
    arguments = {p.name: str(p.default) for p in package["flows.Flow.__init__"].parameters}
    assert list(arguments)[:2] == ["steps", "kernels"]
    assert (arguments["steps"], arguments["kernels"]) == ("8", "(3, 1)")


class Resources(html.parser.HTMLParser):
    """Collects what a page loads."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("rel") not in ("canonical", "prev", "next"):
            self.found += [v for k, v in attrs.items() if (tag, k) in LOADED and v]


def test_pages_load_nothing_from_elsewhere(site):
    n = 0
    for file in site.rglob("*.html"):
        resources = Resources()
        resources.feed(file.read_text())
        elsewhere = [link for link in resources.found if re.match(r"(\w+:)?//", link)]
        assert not elsewhere, file
        n += len(resources.found)
    assert n > 100
    for file in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", file.read_text()), file


@pytest.fixture
def address(site):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.skipif(BINARY is None, reason="needs Chromium")
def test_search_dark_mode_and_narrow_windows_in_a_browser(address, tmp_path):
    with page(tmp_path) as browser:
        browser.size(390, 844, mobile=True)
        for name in ("", "models/", "reference/flows/", "concepts/", "get_started/"):
            browser.open(address + name)
            width = browser.run("document.documentElement.scrollWidth")
            assert width <= 390, name
        browser.size(1200, 900, dark=True)
        browser.open(address)
        assert browser.run("document.body.dataset.mdColorScheme") == "slate"
        browser.run("document.querySelector('#__search').click()")
        browser.run(
            "(box => { box.focus(); box.value = 'coreset';"
            " box.dispatchEvent(new Event('input', {bubbles: true}));"
            " box.dispatchEvent(new Event('keyup', {bubbles: true})); })"
            "(document.querySelector('.md-search__input'))"
        )
        found = "[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
        for _ in range(100):
            if results := browser.run(found):
                break
            browser.settle()
        assert any("recipe" in link for link in results)
        assert all(url.startswith((address, "data:", "blob:")) for url in browser.requests)


def test_broken_links_and_anchors_end_the_build(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("docs", "build", ".git"):
            (copy / path.name).symlink_to(path)
    (copy / "mkdocs.yml").unlink()
    shutil.copy(ROOT / "mkdocs.yml", copy)
    shutil.copytree(ROOT / "docs", copy / "docs")
    for name, link in {
        "tiles.md": "missing.md",
        "speed.md": "tiles.md#missing",
        "flows.md": "../benchmarks/results/missing.json",
    }.items():
        with (copy / "docs" / name).open("a") as file:
            file.write(f"\n[link]({link})\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    for name, link in (
        ("tiles.md", "missing.md"),
        ("speed.md", "tiles.md#missing"),
        ("flows.md", "repository/benchmarks/results/missing.json"),
    ):
        assert re.search(rf"{name}'.* '{link}'", done.stderr), done.stderr
