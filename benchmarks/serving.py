"""Load on the server: both engines, several numbers of clients, lost workers, bad images.

    pip install -e '.[serve]'
    python benchmarks/serving.py runs/demo --images FOLDER --cores 0 --out result.json

The detector of a run is served twice on loopback, each by one worker process on the same cores:
exported to ONNX, and with JAX. Clients send the images of the folder in turn.
The engines take turns of `--seconds` for each number of clients. Afterwards the worker process of
the ONNX engine is killed again and again under load, and requests that are no images are sent.

Each line `ratio <name> <number>` is images per second of ONNX over JAX, or a time of JAX over ONNX.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
from outcome import describe_machine, ratios, versions, write_result

CLIENTS = (1, 8, 64)
KILLS, SECONDS_BETWEEN_KILLS = 5, 2.0
BAD = {"text": b"no image", "empty": b"", "truncated": b"\x89PNG\r\n\x1a\n" + bytes(20)}


class Server:
    """A server process of one model."""

    def __init__(self, model: pathlib.Path, cores: list[int]):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        arguments = f"{{'model': {str(model)!r}}}, port={self.port}, threads={len(cores)}"
        code = f"import os, sys; os.sched_setaffinity(0, {cores}); "
        code += f"from fastflow_jax import serve; sys.exit(serve.run({arguments}))"
        self.process = subprocess.Popen([sys.executable, "-c", code])
        start = time.monotonic()
        while self.ask("GET", "/readyz")[0] != 200:
            if self.process.poll() is not None or time.monotonic() - start > 600:
                sys.exit(f"The server of {model} did not start.")
            time.sleep(0.05)
        self.seconds_to_start = time.monotonic() - start

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and content of a response; status 0 if there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        return 0, b""

    def worker(self) -> int | None:
        """Id of the worker process."""
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(") ")[2].split()
                if int(fields[1]) == self.process.pid and fields[0] != "Z":
                    return int(stat.parent.name)
        return None

    def end(self) -> int:
        """Ends the server; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(model: pathlib.Path, cores: list[int]) -> Iterator[Server]:
    """A server process, which is ended at the end of the context."""
    server = Server(model, cores)
    try:
        yield server
    finally:
        status = server.end()
        if status:
            print(f"The server of {model} ended with status {status}.", file=sys.stderr)


def load(server: Server, images: list[bytes], clients: int, seconds: float) -> list:
    """Returns status and seconds of each request that `clients` send for some seconds."""
    found, end = [], time.monotonic() + seconds

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        for i in itertools.count(first):
            start = time.monotonic()
            if start > end:
                break
            try:
                connection.request("POST", "/v1/predict", images[i % len(images)])
                response = connection.getresponse()
                response.read()
                status = response.status
            except OSError:
                connection.close()
                status = 0
            found.append((status, time.monotonic() - start))
        connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def summarise(turns: list[tuple[list, float]]) -> dict:
    """Images per second and latencies of all turns of one engine and number of clients."""
    answered = [seconds for found, _ in turns for status, seconds in found if status == 200]
    p50, p99 = np.percentile(answered, [50, 99])
    rates = [sum(status == 200 for status, _ in found) / seconds for found, seconds in turns]
    return {
        "images_per_second": round(float(np.median(rates)), 2),
        "p50_ms": round(1e3 * float(p50), 1),
        "p99_ms": round(1e3 * float(p99), 1),
        "requests": sum(len(found) for found, _ in turns),
        "not_answered": sum(len(found) for found, _ in turns) - len(answered),
    }


def compare(
    servers: dict[str, Server], images: list[bytes], rounds: int, seconds: float
) -> list[dict]:
    """Measures all engines in turns, for each number of clients."""
    rows = []
    for clients in CLIENTS:
        turns: dict[str, list] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, server in servers.items():
                start = time.monotonic()
                found = load(server, images, clients, seconds)
                turns[name].append((found, time.monotonic() - start))
        for name in servers:
            rows.append({"engine": name, "clients": clients, **summarise(turns[name])})
            print(rows[-1], flush=True)
    return rows


def kill_workers(server: Server, images: list[bytes]) -> dict:
    """Kills the worker process under the load of eight clients; counts lost requests."""
    killed = 0
    seconds = KILLS * SECONDS_BETWEEN_KILLS

    def kill() -> None:
        nonlocal killed
        for _ in range(KILLS):
            time.sleep(SECONDS_BETWEEN_KILLS)
            worker = server.worker()
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
                killed += 1

    killing = threading.Thread(target=kill)
    killing.start()
    found = load(server, images, 8, seconds)
    killing.join()
    lost = sum(status != 200 for status, _ in found)
    return {"workers_killed": killed, "requests": len(found), "lost": lost}


def tabulate(rows: list[dict]) -> tuple[list[dict], dict[str, float]]:
    """The table of ratios, a row for each number of clients, and the ratios by name."""
    table, numbers = [], {}
    for clients in CLIENTS:
        onnx, jax = (row for row in rows if row["clients"] == clients)
        cells = {"rate": onnx["images_per_second"] / jax["images_per_second"]}
        cells |= {name: jax[f"{name}_ms"] / onnx[f"{name}_ms"] for name in ("p50", "p99")}
        numbers |= {f"{name}_{clients}_clients": value for name, value in cells.items()}
        table.append({"clients": str(clients)} | {k: f"{v:.2f}" for k, v in cells.items()})
    return table, numbers


def main() -> None:
    """Measures, prints the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="directory of a finished run")
    parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of images")
    parser.add_argument("--onnx", type=pathlib.Path, help="the exported run, if there is a file")
    parser.add_argument("--cores", type=int, nargs="+", help="cores of the servers; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    cores = args.cores or sorted(os.sched_getaffinity(0))
    files = sorted(path for path in args.images.iterdir() if path.is_file())
    images = [path.read_bytes() for path in files]
    with ratios() as found, contextlib.ExitStack() as stack:
        file = args.onnx
        if file is None:
            from fastflow_jax import Detector

            file = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()), "model.onnx")
            Detector.load(args.run).export(file)
        servers = {
            name: stack.enter_context(serving(model, cores))
            for name, model in (("onnx", file), ("jax", args.run))
        }
        rows = compare(servers, images, args.rounds, args.seconds)
        kills = kill_workers(servers["onnx"], images)
        bad = {name: servers["onnx"].ask("POST", "/v1/predict", BAD[name]) for name in BAD}
        table, numbers = tabulate(rows)
        found.update(numbers)
    print(kills, bad)
    result = {
        "page": "docs/serving.md",
        "command": f"python benchmarks/serving.py RUN --images FOLDER --rounds {args.rounds} "
        f"--seconds {args.seconds:g} --cores {' '.join(map(str, cores))}",
        "commit": subprocess.getoutput("git rev-parse --short HEAD"),
        "machine": describe_machine(),
        "versions": versions("jax", "onnxruntime", "starlette", "uvicorn"),
        "seeds": "0",
        "data": f"{len(images)} image files, {sum(map(len, images)) // len(images)} bytes each on "
        "average",
        "columns": {
            "clients": "clients",
            "rate": "images per second, ONNX over JAX",
            "p50": "median latency, JAX over ONNX",
            "p99": "99th percentile, JAX over ONNX",
        },
        "rows": table,
        "measured": rows,
        "seconds_to_start": {name: round(s.seconds_to_start, 1) for name, s in servers.items()},
        "killed_workers": kills,
        "bad_images": {name: [status, json.loads(body)] for name, (status, body) in bad.items()},
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
