"""The web page at `/`: files, and headers that keep it from loading anything from elsewhere."""

import pathlib

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import fastflow_jax

_PAGE = pathlib.Path(__file__).parent
_SHARED = pathlib.Path(fastflow_jax.__file__).parent / "report"  # with the other pages
_SCRIPTS = ("png16", "server", "camera", "models", "threshold", "view", "page")
_FILES = {
    "/": (_PAGE / "page.html", "text/html"),
    "/page.css": (_PAGE / "page.css", "text/css"),
    **{f"/{name}.js": (_PAGE / f"{name}.js", "text/javascript") for name in _SCRIPTS},
    "/icon.svg": (_PAGE / "icon.svg", "image/svg+xml"),
    "/theme.css": (_SHARED / "theme.css", "text/css"),
    "/overlay.js": (_SHARED / "overlay.js", "text/javascript"),
}
PATHS = frozenset(_FILES)  # which hold nothing secret, and need no token
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[Route]:
    """The routes of the page."""
    contents = {path: (file.read_bytes(), kind) for path, (file, kind) in _FILES.items()}

    async def page(request: Request) -> Response:
        """A file of the page."""
        content, kind = contents[request.scope["path"]]
        return Response(content, media_type=kind, headers=_HEADERS)

    return [Route(path, page) for path in _FILES]
