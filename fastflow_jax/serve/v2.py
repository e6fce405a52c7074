"""The open inference protocol, version 2: tensors in JSON or binary.

Of its HTTP form, as KServe and Triton describe it: metadata, readiness and inference of models, and
the binary tensor extension, in which tensors follow the JSON header of a request or response.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import fastflow_jax
from fastflow_jax.serve.models import MAX_IMAGES, Loaded, Model

_HEADER_LENGTH = "inference-header-content-length"
_BINARY = "binary_tensor_data"
_INPUT = "images"
_DATATYPES = {"float32": "FP32", "bool": "BOOL"}


class Protocol:
    """Answers the requests of the protocol."""

    def __init__(
        self, find: Callable[[str | None], Model], in_thread: Callable[..., Awaitable[Any]]
    ):
        """Takes a function from names to models, and one that calls functions in a thread."""
        self._find, self._in_thread = find, in_thread

    def routes(self) -> list[Route]:
        """The routes of the protocol, without health."""
        model, version = "/v2/models/{name}", "/versions/{version}"
        return [
            Route("/v2", self.describe_server),
            *(Route(model + part, self.describe) for part in ("", version)),
            *(Route(model + part + "/ready", self.ready) for part in ("", version)),
            *(
                Route(model + part + "/infer", self.infer, methods=["POST"])
                for part in ("", version)
            ),
        ]

    async def describe_server(self, request: Request) -> Response:
        """Name, version and extensions of the server."""
        del request
        about = {"name": "fastflow-jax", "version": fastflow_jax.__version__}
        return JSONResponse(about | {"extensions": [_BINARY]})

    async def describe(self, request: Request) -> Response:
        """Inputs and outputs of a model."""
        model = self._model(request)
        loaded, size = model.current, list(model.current.image_size)
        decision = loaded.decision
        outputs = {"score": ("FP32", [-1]), "anomaly_map": ("FP32", [-1, *size])}
        if decision.held_out is not None:
            outputs["p_value"] = ("FP32", [-1])
        if decision.image_threshold is not None:
            outputs["is_anomalous"] = ("BOOL", [-1])
        if decision.pixel_threshold is not None:
            outputs["mask"] = ("BOOL", [-1, *size])
        return JSONResponse(
            {
                "name": model.name,
                "versions": [loaded.version],
                "platform": "fastflow_jax",
                "inputs": [{"name": _INPUT, "datatype": "UINT8", "shape": [-1, *size, 3]}],
                "outputs": [
                    {"name": name, "datatype": datatype, "shape": shape}
                    for name, (datatype, shape) in outputs.items()
                ],
            }
        )

    async def ready(self, request: Request) -> Response:
        """Whether a model has a worker process; status 503 if not."""
        is_ready = self._model(request).current.is_ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def infer(self, request: Request) -> Response:
        """Scores a batch of model inputs."""
        model, body = self._model(request), await request.body()
        header_length = request.headers.get(_HEADER_LENGTH)
        return await self._in_thread(_infer, model, body, header_length)

    def _model(self, request: Request) -> Model:
        model = self._find(request.path_params["name"])
        version = request.path_params.get("version")
        if version not in (None, model.current.version):
            raise HTTPException(
                404, f"{model.name} has version {model.current.version}. Leave the version out."
            )
        return model


def _infer(model: Model, body: bytes, header_length: str | None) -> Response:
    header, binary = _split(body, header_length)
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The request is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "The request must be a JSON object with inputs.")
    with model.use() as loaded:
        images = _images(content, binary, loaded.image_size)
        found = loaded.run(images)
        found = {**found, **loaded.decision(found["score"], found["anomaly_map"])}
        return _respond(content, found, loaded)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """JSON and binary data of a request."""
    if header_length is None:
        return body, b""
    if not re.fullmatch("[0-9]{1,12}", header_length) or int(header_length) > len(body):
        raise HTTPException(
            400, f"{_HEADER_LENGTH} is {header_length}. Send the length of the JSON in bytes."
        )
    return body[: int(header_length)], body[int(header_length) :]


def _images(content: dict, binary: bytes, image_size: tuple[int, int]) -> np.ndarray:
    """The input of a request, uint8 [B, H, W, 3]."""
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise HTTPException(400, f"inputs must be a list of one tensor, {_INPUT}.")
    tensor, expected = inputs[0], [*image_size, 3]
    shape = tensor.get("shape")
    if tensor.get("name") != _INPUT or tensor.get("datatype") != "UINT8":
        raise HTTPException(400, f"The input must have the name {_INPUT} and the datatype UINT8.")
    if (
        not isinstance(shape, list)
        or not all(type(n) is int and n > 0 for n in shape)
        or shape[1:] != expected
    ):
        raise HTTPException(400, f"The shape must be [B, {', '.join(map(str, expected))}].")
    if shape[0] > MAX_IMAGES:
        raise HTTPException(400, f"The batch has {shape[0]} images. Send at most {MAX_IMAGES}.")
    size = math.prod(shape)
    if "binary_data_size" in _parameters(tensor):
        values = np.frombuffer(binary, np.uint8)
    else:
        values = _from_json(tensor.get("data"))
    if values.size != size:
        raise HTTPException(400, f"The input has {values.size} values. Its shape needs {size}.")
    return values.reshape(shape)


def _from_json(data: Any) -> np.ndarray:
    """Numbers of a flat or nested list, uint8 [n]."""
    try:
        values = np.asarray(data)
    except ValueError:  # lists of different lengths
        values = np.asarray(None)
    if values.dtype.kind not in "iu" or (
        values.size and not 0 <= values.min() <= values.max() < 256
    ):
        raise HTTPException(400, "data must be integers from 0 to 255.")
    return values.astype(np.uint8).ravel()


def _parameters(of: Any) -> dict:
    found = of.get("parameters") if isinstance(of, dict) else None
    return found if isinstance(found, dict) else {}


def _respond(content: dict, found: dict[str, np.ndarray], loaded: Loaded) -> Response:
    """The response with the requested outputs, or all of them."""
    requested = content.get("outputs") or [{"name": name} for name in found]
    all_binary = _parameters(content).get("binary_data_output", False)
    outputs, parts = [], []
    for output in requested if isinstance(requested, list) else [None]:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in found:
            raise HTTPException(400, f"The output {name!r} is unknown. Pass some of {[*found]}.")
        if any(name == other["name"] for other in outputs):  # of any size, from a short request
            raise HTTPException(400, f"The output {name!r} is requested twice. Pass it once.")
        array = np.asarray(found[name])
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        described = {
            "name": name,
            "datatype": _DATATYPES[array.dtype.name],
            "shape": list(array.shape),
        }
        if _parameters(output).get("binary_data", all_binary):
            parts.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
            described["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            described["data"] = array.ravel().tolist()
        outputs.append(described)
    about = {"model_name": loaded.name, "model_version": loaded.version, "outputs": outputs}
    if isinstance(content.get("id"), str):
        about["id"] = content["id"]
    if not parts:
        return JSONResponse(about)
    header = json.dumps(about).encode()
    return Response(
        b"".join([header, *parts]),
        media_type="application/octet-stream",
        headers={_HEADER_LENGTH: str(len(header))},
    )
