"""The web application: scores of image files, false alarms, health, metrics; `v2` has tensors."""

import asyncio
import base64
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fastflow_jax.errors import InputError
from fastflow_jax.prediction import MAP_FORMS, Prediction, encode_map
from fastflow_jax.serve import page, v2
from fastflow_jax.serve.about import describe
from fastflow_jax.serve.false_alarms import FalseAlarms
from fastflow_jax.serve.gate import Gate, Limits, Load, busy, error_response
from fastflow_jax.serve.metrics import CONTENT_TYPE, Metrics
from fastflow_jax.serve.models import MAX_IMAGES, Loaded, Model, watch
from fastflow_jax.serve.worker import WorkerLost

T = TypeVar("T")
_WATCH_SECONDS = 1.0


class Service:
    """Answers the requests for some models."""

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits,
        load: Load,
        metrics: Metrics,
        false_alarms: Mapping[str, FalseAlarms],
    ):
        """Prepares the threads that read images and wait for workers; one for each request."""
        self.models, self.limits, self.load, self.metrics = models, limits, load, metrics
        self.false_alarms = false_alarms
        self._threads = ThreadPoolExecutor(limits.queue, thread_name_prefix="request")

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def find(self, name: str | None) -> Model:
        """Returns a model by name; without a name the only one.

        Raises:
          HTTPException: there is none of that name, or several and no name.
        """
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        names = ", ".join(self.models)
        if name is None:
            raise HTTPException(400, f"Several models are served. Pass ?model= one of {names}.")
        if name not in self.models:
            raise HTTPException(404, f"There is no model {name!r}. Choose one of {names}.")
        return self.models[name]

    async def predict(self, request: Request) -> Response:
        """Scores the image in the body, or the files of a form."""
        model = self.find(request.query_params.get("model"))
        anomaly_map = _choice(request, "map", MAP_FORMS)
        mask = _choice(request, "mask", ("png",))
        is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
        files = await _files_of_form(request) if is_form else [("image", await request.body())]
        if not any(content for _, content in files):
            raise HTTPException(
                400, "The request has no image. Send its bytes, or a form of files."
            )

        def score() -> list[dict]:
            answers, n_pixels, most = [], 0, self.limits.max_map_pixels
            with model.use() as loaded:
                for prediction in loaded.score(files, MAX_IMAGES if is_form else 1):
                    answers.append(_as_json(loaded, prediction, anomaly_map, mask))
                    n_pixels += prediction.anomaly_map.size
                    if (anomaly_map or mask) and n_pixels > most:
                        raise InputError(
                            f"The maps of the request have more than {most} pixels. Send fewer "
                            "images at once, or leave map and mask out."
                        )
            return answers

        found = await self.in_thread(score)
        if is_form:
            return JSONResponse({"predictions": found})
        return JSONResponse(found[0])

    async def list_models(self, request: Request) -> Response:
        """Describes all models, and the size of the largest request."""
        del request
        models = [describe(model, self.false_alarms) for model in self.models.values()]
        return JSONResponse({"models": models, "max_bytes": self.limits.max_bytes})

    async def mark(self, request: Request) -> Response:
        """Stores the image in the body as a false alarm; status 201 if it is new."""
        model, marked = self._marked(request)
        content = await request.body()

        def add() -> tuple[str, bool]:
            with model.use() as loaded:
                return marked.add(content, loaded.format_of(content))

        name, is_new = await self.in_thread(add)
        return JSONResponse({"name": name, "images": len(marked)}, 201 if is_new else 200)

    async def unmark(self, request: Request) -> Response:
        """Removes a false alarm."""
        _, marked = self._marked(request)
        await self.in_thread(marked.remove, request.path_params["name"])
        return JSONResponse({"images": len(marked)})

    def _marked(self, request: Request) -> tuple[Model, FalseAlarms]:
        """The model of a request, and its false alarms."""
        model = self.find(request.query_params.get("model"))
        if model.name not in self.false_alarms:
            raise HTTPException(
                404, "False alarms are not stored. Start the server with --false_alarms=DIR."
            )
        return model, self.false_alarms[model.name]

    async def live(self, request: Request) -> Response:
        """The process answers."""
        del request
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether requests are accepted and all models have a worker; status 503 if not."""
        del request
        is_ready = not self.load.is_draining and all(
            model.current.is_ready for model in self.models.values()
        )
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def report(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        del request
        return PlainTextResponse(self.metrics.text(), media_type=CONTENT_TYPE)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Watches the files of the models while the application runs."""
        del app
        stop = threading.Event()
        thread = threading.Thread(target=watch, args=(self.models, _WATCH_SECONDS, stop))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            await asyncio.get_running_loop().run_in_executor(None, thread.join)


def create_app(
    models: Mapping[str, Model],
    limits: Limits,
    load: Load,
    metrics: Metrics,
    false_alarms: Mapping[str, FalseAlarms],
) -> Starlette:
    """Returns the ASGI application.

    Args:
      models: by the name that requests give.
      limits: what is accepted.
      load: updated with each request; the server sets `is_draining`.
      metrics: updated with each request.
      false_alarms: where to store marked images, by model; empty to store none.
    """
    service = Service(models, limits, load, metrics, false_alarms)
    tensors = v2.Protocol(service.find, service.in_thread)
    return Starlette(
        routes=[
            *page.routes(),
            Route("/v1/predict", service.predict, methods=["POST"]),
            Route("/v1/models", service.list_models),
            Route("/v1/false_alarms", service.mark, methods=["POST"]),
            Route("/v1/false_alarms/{name}", service.unmark, methods=["DELETE"]),
            Route("/healthz", service.live),
            Route("/readyz", service.ready),
            Route("/metrics", service.report),
            Route("/v2/health/live", service.live),
            Route("/v2/health/ready", service.ready),
            *tensors.routes(),
        ],
        middleware=[Middleware(Gate, limits=limits, load=load, metrics=metrics)],
        exception_handlers={
            HTTPException: _http_error,
            ClientDisconnect: _disconnected,
            InputError: _unprocessable,
            WorkerLost: _lost,
            Exception: _failed,
        },
        lifespan=service.lifespan,
    )


def _http_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, error.detail, dict(error.headers or {}))


def _unprocessable(request: Request, error: Exception) -> Response:
    del request
    return error_response(422, str(error))


def _lost(request: Request, error: Exception) -> Response:
    del request
    return busy(str(error))


def _disconnected(request: Request, error: Exception) -> Response:
    del request, error
    return error_response(400, "The connection was closed before the end of the request.")


def _failed(request: Request, error: Exception) -> Response:
    del request, error
    return error_response(500, "The server failed. See its log.")


def _choice(request: Request, name: str, allowed: tuple[str, ...]) -> str | None:
    value = request.query_params.get(name)
    if value is not None and value not in allowed:
        raise HTTPException(400, f"{name}={value} is unknown. Pass one of {', '.join(allowed)}.")
    return value


async def _files_of_form(request: Request) -> list[tuple[str, bytes]]:
    async with request.form(max_files=MAX_IMAGES) as form:
        return [
            (file.filename or "image", await file.read())
            for _, file in form.multi_items()
            if isinstance(file, UploadFile)
        ]


def _as_json(
    loaded: Loaded, prediction: Prediction, anomaly_map: str | None, mask: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": prediction.name,
        "score": prediction.score,
        "p_value": prediction.p_value,
        "is_anomalous": prediction.is_anomalous,
        "threshold": loaded.threshold,
        "model": loaded.name,
        "version": loaded.version,
    }
    if anomaly_map is not None:
        found["anomaly_map"] = _encoded_map(prediction.anomaly_map, anomaly_map)
    if mask is not None:
        found["mask"] = None if prediction.mask is None else _png(np.uint8(255) * prediction.mask)
    return found


def _encoded_map(anomaly_map: np.ndarray, form: str) -> dict[str, Any]:
    """An anomaly map as base64, see `encode_map`."""
    content, zero, full = encode_map(anomaly_map, form)
    found = {"format": form, "data": base64.b64encode(content).decode()}
    return found if zero is None else found | {"zero": zero, "full": full}


def _png(array: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
