# Server for exported detectors, without JAX; see docs/serving.md.
#   docker build -t fastflow-serve .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/models:/models:ro" -e FASTFLOW_TOKEN=... fastflow-serve
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY fastflow_jax fastflow_jax
COPY configs configs
RUN python -m venv /venv \
 && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
 && /venv/bin/pip install --no-cache-dir \
    'numpy>=2.0' 'pillow>=12.0' 'onnxruntime>=1.20' 'starlette>=0.46' 'uvicorn>=0.34' \
    'python-multipart>=0.0.18' 'prometheus-client>=0.20' \
 && /venv/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home fastflow
COPY --from=build /venv /venv
USER fastflow
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["/venv/bin/python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
CMD ["/venv/bin/python", "-c", \
  "import pathlib, sys; from fastflow_jax import serve; sys.exit(serve.run({file.stem: file for file in pathlib.Path('/models').glob('*.onnx')}, host='0.0.0.0'))"]
