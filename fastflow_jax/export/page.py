"""A web page that scores images in the browser, with the model and ONNX Runtime Web inside."""

import base64
import gzip
import pathlib
import tarfile
from collections.abc import Mapping
from typing import Any

import jinja2

import fastflow_jax
from fastflow_jax.errors import InputError

_HERE = pathlib.Path(__file__).parent
_SHARED = pathlib.Path(fastflow_jax.__file__).parent / "report"  # with the other pages
# Files of the npm package onnxruntime-web, by their id in the page.
_RUNTIME = {"script": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
_THEME = {"css": "theme.css", "js": "overlay.js"}
_LARGEST = 2**28  # bytes of a file of the runtime
_REMEDY = "Run `npm pack onnxruntime-web`, and pass the file that it writes as --runtime=FILE"


def read_runtime(path: pathlib.Path | None) -> dict[str, bytes]:
    """Reads ONNX Runtime Web.

    Args:
      path: the npm package onnxruntime-web, as the file of `npm pack` or as a directory.

    Raises:
      InputError: there is no path, or it is not that package.
    """
    if path is None:
        raise InputError(f"A web page needs ONNX Runtime Web. {_REMEDY}.")
    try:
        if path.is_dir():
            return {key: (path / "dist" / name).read_bytes() for key, name in _RUNTIME.items()}
        with tarfile.open(path, "r:gz") as archive:
            members = {key: f"package/dist/{name}" for key, name in _RUNTIME.items()}
            return {key: _member(archive, member) for key, member in members.items()}
    except Exception as error:  # a damaged archive may cause any
        raise InputError(
            f"{path} is not the npm package onnxruntime-web ({error}). {_REMEDY}."
        ) from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None or archive.getmember(name).size > _LARGEST:
        raise ValueError(f"{name} is not a file of at most {_LARGEST} bytes")
    return file.read()


def page(model: bytes, runtime: Mapping[str, bytes], about: Mapping[str, Any]) -> str:
    """Returns the page as HTML.

    Args:
      model: content of an ONNX file that takes images of any size.
      runtime: see `read_runtime`.
      about: what the page states, as JSON values: "name", "version", "detector", "backbone",
        "licence", "parity"; "threshold", "rate" and "colour_range", or None for each.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    files = {name: _packed(content) for name, content in {**runtime, "model": model}.items()}
    shared = {kind: (_SHARED / name).read_text("utf-8") for kind, name in _THEME.items()}
    js = shared["js"] + (_HERE / "page.js").read_text("utf-8")
    template = environment.get_template("page.html.jinja")
    return template.render(about=about, files=files, css=shared["css"], js=js)


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
