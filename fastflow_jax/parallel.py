"""The one place that knows devices and processes.

Training and scoring are written as pure functions of a global batch. Here they are compiled for
all devices, as `jax.pmap` over the batch ("pmap", the default) or as `jax.jit` over a mesh ("jit").
The state is replicated and the batch is split. What the devices do not divide is padded: in
training the rows of padding carry weight zero, in scoring they are cut off again.

Several processes, on one host or many, run the same program in step. Each holds the whole state and
all cached features, reads and scores its share of the images, and trains on its columns of each
batch; what they compute is exchanged bit for bit. The first one alone writes files and speaks.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastflow_jax.errors import InputError

AXIS = "batch"
KINDS = ("pmap", "jit")


_process: int | None = None  # that uses JAX


def check_not_forked() -> None:
    """Raises InputError in a process that was forked from one in which a detector was used.

    The threads of JAX do not live on in it, so that it would wait for them for ever.
    """
    global _process
    if _process not in (None, os.getpid()):
        raise InputError(
            "This process was forked from one that had used JAX, which cannot work in it. Start "
            "processes by multiprocessing's spawn or forkserver, or load the detector only in "
            "the forked ones."
        )
    _process = os.getpid()


def total(tree: Any, axis_name: str | None) -> Any:
    """Sum over the devices of a named axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the processes that share a run, before JAX is asked for anything else.

    Args:
      coordinator: host:port of process 0; None, as the other two, where the cluster tells (TPU
        pods, Slurm, MPI).
      processes: how many there are.
      process: which of them this one is, from 0 on.

    Raises:
      InputError: something is missing that the cluster does not tell, or nobody can listen at the
        coordinator's address.
    """
    if coordinator is not None:
        _check_address(coordinator, serves=process == 0)
    # Its handler would take SIGTERM from a run that saves on it, see `loop.signals_set_a_flag`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(coordinator, processes, process),
            heartbeat_timeout_seconds=30,  # so long the others wait for one that is dead
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise InputError(
            f"cannot join the processes of this run ({error}): give each --coordinator=HOST:PORT, "
            "--processes=N and its --process, from 0 on"
        ) from error


def _check_address(coordinator: str, serves: bool) -> None:
    """JAX ends without a message where process 0 cannot listen at the address."""
    _, _, port = coordinator.rpartition(":")
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator) or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:1234")
    if not serves:
        return
    try:
        with socket.create_server(("", int(port))):
            pass
    except OSError as error:
        raise InputError(
            f"--coordinator={coordinator}: process 0 cannot listen at that port "
            f"({error.strerror}): give another one"
        ) from error


def on_cpu() -> bool:
    """Whether programs run on the CPU, not on a GPU or TPU."""
    return jax.default_backend() == "cpu"


def n_devices() -> int:
    """The number of devices of all processes."""
    return jax.device_count()


def n_own_devices() -> int:
    """The number of devices of this process."""
    return jax.local_device_count()


def n_processes() -> int:
    """The number of processes that share the run."""
    return jax.process_count()


def device_description() -> str:
    """Number and kind of the devices, such as "1 x cpu".

    Raises:
      Exception: of JAX or of a driver, if there is no device.
    """
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def free_memory() -> int:
    """Free memory in bytes of the fullest device of this process; 0 if it is not known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return min(s["bytes_limit"] - s["bytes_in_use"] if s else 0 for s in stats)


def on_default_device(tree: Any) -> Any:
    """The arrays of a tree, on the default device of this process."""
    return jax.device_put(tree)


def is_main() -> bool:
    """Of several processes the first one writes and speaks."""
    return jax.process_index() == 0


def is_lost(error: BaseException | None) -> bool:
    """Whether this error, of several processes, may mean that one of the others has ended."""
    return isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, the only one that calls it, for all of them.

    It is a plain value, as JSON has them. All wait for it, and an InputError is raised in all.
    """
    if jax.process_count() == 1:
        return function()
    error = None
    message = b""
    if is_main():
        try:
            message = json.dumps({"value": function()}).encode()
        except InputError as raised:
            error = raised
            message = json.dumps({"error": str(raised)}).encode()
    size = int(_from_main(np.int32(len(message))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    answer = json.loads(_from_main(buffer).tobytes())
    if "error" in answer:
        raise error or InputError(answer["error"])
    return answer["value"]


def any_process(flag: int | bool) -> int:
    """The largest flag that a process has, 0 or more: the same in all of them."""
    if jax.process_count() == 1:
        return flag
    return int(multihost_utils.process_allgather(np.int32(flag)).max())


def own_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where this process keeps what is only its own: the folder itself if it is alone.

    Of several, each has an empty one inside: what an interrupted run left to one of them, the
    others may lack.
    """
    if jax.process_count() == 1:
        return folder
    own = folder / f"process_{jax.process_index()}"
    shutil.rmtree(own, ignore_errors=True)
    return own


def columns(batches: np.ndarray) -> np.ndarray:
    """The columns of global batches [steps, B] that this process trains on."""
    local = batches.shape[1] // jax.process_count()
    return batches[:, jax.process_index() * local :][:, :local]


def shared_out(
    read: Callable[[np.ndarray, int], Iterable], rows: np.ndarray, size: int
) -> Iterator[Any]:
    """What `read(rows, size)` yields, of which each process reads its share only.

    Args:
      read: rows [M] and a batch size -> for each batch, of which the last may be short, a tree of
        arrays with a row an image.
      rows: of all processes.
      size: of their batches.
    """
    if jax.process_count() == 1:
        return read(rows, size)
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    mine = np.concatenate([rows[:0], *(batch[_share(len(batch))] for batch in batches)])
    parts = read(mine, len(_share(size)))
    return (_exchange(part, len(b)) for b, part in zip(batches, parts, strict=True))


def _share(n: int) -> np.ndarray:
    """Which of n rows this process has: each as many, with the last row again to make up for it."""
    size = -(-n // jax.process_count())
    return np.minimum(jax.process_index() * size + np.arange(size), n - 1)


def _exchange(tree: Any, n: int) -> Any:
    """Arrays of all n rows, from those of the `_share` of each process."""

    def whole(leaf):
        leaf = np.ascontiguousarray(leaf)
        content = leaf.reshape(len(leaf), -1).view(np.uint8)  # JAX would round 64 bits to 32
        content = multihost_utils.process_allgather(content, tiled=True)
        return content.view(leaf.dtype).reshape(-1, *leaf.shape[1:])[:n]

    return tree if jax.process_count() == 1 else jax.tree.map(whole, tree)


def _from_main(array: np.ndarray) -> np.ndarray:
    return multihost_utils.broadcast_one_to_all(array)


def to_all(tree: Any) -> Any:
    """A state that each process holds, as one that they hold together: to save it."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.host_local_array_to_global_array(tree, _mesh(), PartitionSpec())


def to_own(tree: Any) -> Any:
    """The inverse of `to_all`."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.global_array_to_host_local_array(tree, _mesh(), PartitionSpec())


def of_all() -> jax.sharding.Sharding:
    """Where the leaves of `to_all` lie: on every device; with one process, on its first."""
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(_mesh(), PartitionSpec())


def step(function: Callable, kind: str) -> Callable:
    """Compile `function(state, batch, weight, axis_name=...) -> state`.

    Args:
      function: pure; sums what it reduces over the batch with `total(..., axis_name)`.
      kind: "pmap" or "jit".

    Returns:
      `(state, batch, weight) -> state`; `weight` and the leaves of `batch` have one leading size,
      which the number of devices divides.
    """
    return _compile(function, kind, shared=1, axis=0, reduces=True)


def epoch(function: Callable, kind: str) -> Callable:
    """Compile `function(state, cache, index, weight, axis_name=...) -> state`.

    As `step`, for arguments `index` and `weight` of [steps, B] each, split along B; every device
    holds the whole `cache`.
    """
    return _compile(function, kind, shared=2, axis=1, reduces=True)


def epochs(function: Callable, kind: str, n: int) -> Callable:
    """Compile `function(states, cache, index, weight, axis_name=...) -> states` for n runs.

    As `epoch`, but all but the cache have an axis of n in front, a run each. Where the devices are
    those of one process and their number divides n, each takes its share of the runs and nothing is
    exchanged. Else each has all runs, and they share the batches as in `epoch`.
    """
    if n % jax.device_count() or jax.process_count() > 1:
        return _compile(function, kind, shared=2, axis=2, reduces=True)
    whole, share = PartitionSpec(), PartitionSpec(AXIS)
    mapped = jax.shard_map(
        functools.partial(function, axis_name=None),
        mesh=_mesh(),
        in_specs=(share, whole, share, share),
        out_specs=share,
        check_vma=False,
    )
    compiled = jax.jit(mapped)

    def run(states, cache, index, weight):
        states, index, weight = split((states, index, weight))
        return compiled(states, cache, index, weight)

    return run


def per_example(function: Callable, kind: str, batch_size: int) -> Callable:
    """Compile `function(state, batch) -> outputs`, one output an example.

    Returns:
      `(state, batch) -> outputs` as numpy arrays with the leading size of `batch`. Shorter batches
      are padded to `batch_size`, so that every call runs the same program. Of several processes
      that all have the batch, each computes its share.
    """
    run = per_own_example(function, kind, batch_size)

    def call(state, batch):
        if jax.process_count() == 1:
            return run(state, batch)
        n = jax.tree.leaves(batch)[0].shape[0]
        rows = _share(n)
        return _exchange(run(state, jax.tree.map(lambda leaf: leaf[rows], batch)), n)

    return call


def per_own_example(function: Callable, kind: str, batch_size: int) -> Callable:
    """As `per_example`, for the share of the batch that this process has read."""
    run = _compile(function, kind, shared=1, axis=0, reduces=False)
    devices = jax.local_device_count()
    size = -(-batch_size // jax.process_count())
    size = -(-size // devices) * devices

    def call(state, batch):
        n = jax.tree.leaves(batch)[0].shape[0]
        whole = max(size, -(-n // devices) * devices)
        if n < whole:
            repeat = np.minimum(np.arange(whole), n - 1)
            batch = jax.tree.map(lambda leaf: leaf[repeat], batch)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:n], run(state, batch))

    return call


def split(tree: Any) -> Any:
    """Arrays spread over this process's devices along their first axis; their number divides it.

    What `jax.jit` makes of them, it makes on all devices.
    """
    return jax.device_put(tree, NamedSharding(_mesh(local=True), PartitionSpec(AXIS)))


def on_devices(tree: Any) -> Any:
    """Arrays of which each of this process's devices has the whole."""
    return _put(tree, NamedSharding(_mesh(local=True), PartitionSpec()))


def _put(tree: Any, place: NamedSharding) -> Any:
    """`jax.device_put`, but for what lies there: even that would take it milliseconds a step."""

    def put(leaf):
        return leaf if getattr(leaf, "sharding", None) == place else jax.device_put(leaf, place)

    return jax.tree.map(put, tree)


def _mesh(local: bool = False) -> Mesh:
    """All devices in a row, process after process, or those of this process."""
    devices = jax.local_devices() if local else jax.devices()
    devices = sorted(devices, key=lambda device: device.process_index)
    return Mesh(np.array(devices), (AXIS,), (AxisType.Auto,))


def _compile(function, kind, *, shared, axis, reduces):
    """`function(*shared, *split)` on devices: the first arguments whole, the others split.

    `axis` is the one that the batch lies on; `reduces` says that the result is the same on all
    devices, and that these are the devices of all processes, each of which gives its part of the
    batch. Else the result is split along the batch, and the devices are those of this process.
    """
    if kind not in KINDS:
        raise InputError(f"parallel is one of {', '.join(KINDS)}, not '{kind}'")
    if kind == "jit":
        mesh = _mesh(local=not reduces)
        whole = PartitionSpec()
        split = PartitionSpec(*[None] * axis, AXIS)
        result = whole if reduces else split

        def call(*arguments):
            return function(*arguments, **({"axis_name": None} if reduces else {}))

        def run(*arguments):
            specs = [whole] * shared + [split] * (len(arguments) - shared)
            if not reduces or jax.process_count() == 1:
                places = [NamedSharding(mesh, spec) for spec in specs]
                return compiled(*map(_put, arguments, places))
            put = functools.partial(
                multihost_utils.host_local_array_to_global_array, global_mesh=mesh
            )
            arguments = [put(a, pspecs=spec) for a, spec in zip(arguments, specs, strict=True)]
            out = compiled(*arguments)
            return multihost_utils.global_array_to_host_local_array(out, mesh, result)

        compiled = jax.jit(call, out_shardings=NamedSharding(mesh, result))
        return run

    devices = jax.devices() if reduces else jax.local_devices()
    local_count = jax.local_device_count()

    def call(whole, batch):
        arguments, _ = whole
        return function(*arguments, *batch, **({"axis_name": AXIS} if reduces else {}))

    def divide(array):
        local = array.shape[axis] // local_count
        return array.reshape(*array.shape[:axis], local_count, local, *array.shape[axis + 1 :])

    mapped = jax.pmap(
        call, AXIS, in_axes=(None, axis), out_axes=None if reduces else 0, devices=devices
    )

    def run(*arguments):
        # To pmap a state that lies elsewhere is another program, traced and compiled anew.
        whole = on_devices(arguments[:shared])
        # Where the first argument has no leaf at all, pmap (jax 0.10) splits the wrong ones: the 0.
        out = mapped((whole, 0), jax.tree.map(divide, arguments[shared:]))
        if reduces:
            return out
        # Joined on the host, where they are wanted.
        return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), out)

    return run
