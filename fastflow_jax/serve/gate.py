"""Checks before a request is read: origin, token, size, number of requests, shutdown."""

import asyncio
import dataclasses
import hmac
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastflow_jax.serve import origin, page
from fastflow_jax.serve.metrics import Metrics

_WITHOUT_TOKEN = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"} | page.PATHS
_READING = {"GET", "HEAD", "OPTIONS"}
_BODY_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the requests that the server accepts."""

    max_bytes: int = 32 * 2**20  # of the body of a request
    queue: int = 64  # requests with images that are answered at the same time
    token: str | None = None  # that requests must carry; None for no check
    max_map_pixels: int = 10**8  # of all maps in an answer; small files may have many pixels


@dataclasses.dataclass
class Load:
    """Requests with images that are being answered."""

    accepted: int = 0
    is_draining: bool = False  # no more are accepted, because the server ends


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A response with a message, as in the open inference protocol."""
    return JSONResponse({"error": message}, status, headers)


class Gate:
    """ASGI middleware that refuses requests, limits bodies and counts.

    A connection is closed after a response that was sent before the whole body was read, so that
    the rest of a large body is not read.
    """

    def __init__(self, app: ASGIApp, limits: Limits, load: Load, metrics: Metrics):
        """Wraps an application."""
        self.app, self._limits, self._load, self._metrics = app, limits, load, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        body = _Body(scope, receive, self._limits.max_bytes)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not body.is_complete:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        is_counted = scope["method"] == "POST"
        refusal = self._refusal(scope, body)
        try:
            if refusal is not None:
                await refusal(scope, receive, answer)
                return
            self._load.accepted += is_counted
            self._metrics.accepted.set(self._load.accepted)
            try:
                await self.app(scope, body.receive, answer)
            finally:
                self._load.accepted -= is_counted
                self._metrics.accepted.set(self._load.accepted)
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - start)

    def _refusal(self, scope: Scope, body: "_Body") -> Response | None:
        limits, headers = self._limits, Headers(scope=scope)
        if scope["method"] not in _READING:
            message = origin.refusal(headers, has_token=limits.token is not None)
            if message is not None:
                return error_response(403, message)
        if limits.token is not None and scope["path"] not in _WITHOUT_TOKEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_equal = hmac.compare_digest(given.strip().encode("latin-1"), limits.token.encode())
            if scheme.lower() != "bearer" or not is_equal:
                message = "The token is missing or wrong. Send Authorization: Bearer TOKEN."
                return error_response(401, message, {"WWW-Authenticate": "Bearer"})
        if body.length > limits.max_bytes:
            return error_response(413, too_large(limits.max_bytes))
        if scope["method"] == "POST":
            if self._load.is_draining:
                return busy("The server is shutting down.")
            if self._load.accepted >= limits.queue:
                return busy(f"The server already has {limits.queue} requests.")
        return None


class _Body:
    """Body of a request; at most `max_bytes` are read, for a limited time."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int):
        headers = Headers(scope=scope)
        self.length = int(headers.get("content-length", 0))
        self.is_complete = self.length == 0 and "transfer-encoding" not in headers
        self._receive, self._left, self._max_bytes = receive, max_bytes, max_bytes
        self._until = time.monotonic() + _BODY_SECONDS

    async def receive(self) -> Message:
        """Returns the next part of the body."""
        if self.is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            message = f"The body did not arrive in {_BODY_SECONDS} s. Send it again."
            raise HTTPException(408, message) from error
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
            if self._left < 0:
                self.is_complete = False
                raise HTTPException(413, too_large(self._max_bytes))
        return message


def too_large(max_bytes: int) -> str:
    """The message for a body that is too large."""
    return f"The request is larger than {max_bytes} bytes. Send smaller or fewer images."


def busy(problem: str) -> Response:
    """A response that asks to send the request again."""
    return error_response(503, f"{problem} Send the request again later.", {"Retry-After": "1"})
