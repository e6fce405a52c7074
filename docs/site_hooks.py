"""Hooks of the documentation site: links from pages to other files of the repository.

Pages of docs/ link to `../README.md`, `../benchmarks/results/seeds.json` or `../examples/`, which
work in a checkout. On the site, the documents of PAGES are pages, other files are copied to
`repository/`, and a directory becomes a page that lists its files. `FIELDS` becomes tables.
"""

import os
import pathlib
import posixpath
import re

import config_fields
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
FIELDS = "<!-- fields -->"  # becomes the tables of the configuration's fields
_LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)")
_BLOCK = re.compile(r"(^ *```.*?^ *```$)", re.S | re.M)


def _is_inside(path: str) -> bool:
    return path == "docs" or path.startswith("docs/")


def _source(page: str) -> str:
    """Path of a page's source in the repository."""
    return {site: name for name, site in PAGES.items()}.get(page, f"docs/{page}")


def _targets(text: str, source: str) -> list[str]:
    """Paths in the repository that a document links to."""
    folder = posixpath.dirname(source)
    prose = _BLOCK.sub("", text)
    return [posixpath.normpath(posixpath.join(folder, link)) for _, link in _LINK.findall(prose)]


def _place(target: str) -> str:
    """Path on the site of a file or directory of the repository."""
    if _is_inside(target):
        return posixpath.relpath(target, "docs")
    if target in PAGES:
        return PAGES[target]
    return f"repository/{target}/index.md" if (ROOT / target).is_dir() else f"repository/{target}"


def _listing(folder: str) -> str:
    """Page with links to the files below a directory."""
    names = sorted(
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    lines = [f"- [{name}]({posixpath.relpath(f'{folder}/{name}', folder)})" for name in names]
    return "\n".join([f"# {folder}/", "", *lines, ""])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents of PAGES, and what they and the pages of docs/ link to."""
    texts = {name: (ROOT / name).read_text() for name in PAGES}
    texts |= {_source(f.src_uri): f.content_string for f in files.documentation_pages()}
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=texts[name]))
    wanted = {target for name, text in texts.items() for target in _targets(text, name)}
    for target in sorted(wanted - {*PAGES}):
        path = ROOT / target
        if _is_inside(target) or not path.exists():
            continue  # a missing file is reported as a broken link
        if path.is_dir():
            files.append(File.generated(config, _place(target), content=_listing(target)))
            for file in (f for f in path.rglob("*") if f.is_file()):
                _copy(files, config, file)
        else:
            _copy(files, config, path)
    return files


def _copy(files: Files, config: MkDocsConfig, path: pathlib.Path) -> None:
    place = _place(path.relative_to(ROOT).as_posix())
    if "__pycache__" not in path.parts and files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, abs_src_path=os.fspath(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to files of the repository by links to their places on the site."""
    if page.file.src_uri.startswith("repository/"):
        return markdown
    source = _source(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri))

    markdown = markdown.replace(FIELDS, config_fields.tables())
    parts = _BLOCK.split(markdown)
    return "".join(p if p.lstrip().startswith("```") else _LINK.sub(replace, p) for p in parts)
