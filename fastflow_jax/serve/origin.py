"""Refusal of requests that pages of other web sites send through the browser of a user."""

import ipaddress

from starlette.datastructures import Headers


def refusal(headers: Headers, *, has_token: bool) -> str | None:
    """Returns why a request that changes or computes something is refused; None if it is not.

    Only browsers send the headers that this reads, so that other programs are never refused.
    A browser that knows the relation of the two sites states it. Otherwise `Origin` must be
    `Host`, and without a token a host name is refused: another site may have made its own name
    point to this server (DNS rebinding).

    Args:
      headers: of the request.
      has_token: whether requests must carry a token, which other sites do not have.
    """
    relation, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if relation is not None:
        return None if relation in ("same-origin", "none") else _FOREIGN
    if origin is None:
        return None
    host = headers.get("host", "")
    if origin.partition("://")[2] != host:
        return _FOREIGN
    if has_token or _is_address(host):
        return None
    return (
        f"Without a token, the page cannot be used under the name {host}. Open it by IP address or "
        "as localhost, or set FASTFLOW_TOKEN."
    )


_FOREIGN = (
    "The request comes from a page of another site. Open the page of this server; a proxy must "
    "pass on the header Host."
)


def _is_address(host: str) -> bool:
    """Whether a value of `Host` is an IP address or localhost, with or without a port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
