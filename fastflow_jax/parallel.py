"""Devices, processes and available memory.

Training and scoring are pure functions of a global batch. This module compiles them for all
devices, with `jax.pmap` over the batch ("pmap", the default) or `jax.jit` over a mesh ("jit"). The
state is replicated and the batch is split. A batch size that the number of devices does not divide
is padded: padding rows have weight zero in training and are dropped in scoring.

Several processes, on one or more hosts, run the same program in lockstep. Each has the whole state
and all cached features, reads and scores its share of the images, and trains on its columns of each
batch. Results are exchanged bit for bit. Only the first process writes files and prints.
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
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastflow_jax.errors import InputError

AXIS = "batch"
KINDS = ("pmap", "jit")

# Decorator: caches compiled programs by the settings that they depend on. Variables and seeds are
# arguments of a program, so that all seeds and categories with the same settings share it.
cached_program = functools.lru_cache(maxsize=16)

_process: int | None = None  # id of the process that uses JAX


def check_not_forked() -> None:
    """Raises InputError in a process forked from one that has used a detector.

    A forked process has none of JAX's threads, and would wait for them forever.
    """
    global _process
    if _process not in (None, os.getpid()):
        raise InputError(
            "This process was forked from one that had used JAX, so JAX cannot work in it. Start "
            "processes with multiprocessing's spawn or forkserver, or load the detector only in "
            "the forked processes."
        )
    _process = os.getpid()


def total(tree: Any, axis_name: str | None) -> Any:
    """Sum over the devices of a named axis; the tree itself if `axis_name` is None."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes that share a run. Must be called before any other use of JAX.

    On TPU pods, Slurm and MPI, JAX finds all three arguments itself if they are None.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      InputError: an argument is missing that JAX cannot find, or process 0 cannot listen at the
        coordinator's port.
    """
    if coordinator is not None:
        _check_address(coordinator, serves=process == 0)
    # The service's SIGTERM handler would replace that of the training loop, which saves the state.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(coordinator, processes, process),
            heartbeat_timeout_seconds=30,  # until a process without heartbeats counts as dead
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise InputError(
            f"This process cannot join the others of the run ({error}). Pass each process "
            "--coordinator=HOST:PORT, --processes=N and its index as --process, from 0."
        ) from error


def _check_address(coordinator: str, serves: bool) -> None:
    """Raises InputError for an address at which JAX would end the process without a message."""
    _, _, port = coordinator.rpartition(":")
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator) or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator={coordinator} is not HOST:PORT. Pass, for example, 10.0.0.1:1234."
        )
    if not serves:
        return
    try:
        with socket.create_server(("", int(port))):
            pass
    except OSError as error:
        raise InputError(
            f"--coordinator={coordinator}: process 0 cannot listen at that port "
            f"({error.strerror}). Pass another port."
        ) from error


def on_cpu() -> bool:
    """Whether the default backend is the CPU."""
    return jax.default_backend() == "cpu"


def n_devices() -> int:
    """Number of devices of all processes."""
    return jax.device_count()


def n_own_devices() -> int:
    """Number of devices of this process."""
    return jax.local_device_count()


def n_processes() -> int:
    """Number of processes that share the run."""
    return jax.process_count()


def device_description() -> str:
    """Number and kind of the devices, such as "1 x cpu".

    Raises:
      Exception: JAX or a driver found no device.
    """
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def available_device_memory() -> int:
    """Available memory in bytes of the fullest device of this process; 0 if it is unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return min(s["bytes_limit"] - s["bytes_in_use"] if s else 0 for s in stats)


def available_host_memory() -> int:
    """Available host memory in bytes, as reported by the OS or the limit of a container."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS reports the total only
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limits = [m for m in map(_container_memory, _CGROUPS) if m is not None]
    return min([available, *limits])


_CGROUP_ROOT = pathlib.Path("/sys/fs/cgroup")
# For cgroup versions 2 and 1: the file of the limit, the file of the statistics, and the statistic
# of memory that cannot be reclaimed.
_CGROUPS = (
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)


def _container_memory(cgroup: tuple[str, str, str]) -> int | None:
    """Bytes that are left below the limit of a container; None without a limit."""
    limit_file, statistics_file, name = cgroup
    try:
        limit = int((_CGROUP_ROOT / limit_file).read_text())
        statistics = (_CGROUP_ROOT / statistics_file).read_text()
    except (OSError, ValueError):
        return None
    used = re.search(rf"^{name} (\d+)$", statistics, re.M)
    return max(0, limit - int(used[1])) if used else None


def on_default_device(tree: Any) -> Any:
    """The arrays of a tree on the default device of this process."""
    return jax.device_put(tree)


def is_main() -> bool:
    """Whether this is the first process, the only one that writes files and prints."""
    return jax.process_index() == 0


def is_lost(error: BaseException | None) -> bool:
    """Whether an error may mean that another process of the run has ended."""
    return isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1


def on_main(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process and returns its result in all processes.

    Args:
      function: returns a value that JSON can represent. An InputError is raised in all processes.
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
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(message), np.int32)))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    answer = json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())
    if "error" in answer:
        raise error or InputError(answer["error"])
    return answer["value"]


def any_process(flag: int | bool) -> int:
    """Maximum of `flag`, 0 or more, over all processes."""
    if jax.process_count() == 1:
        return flag
    return int(multihost_utils.process_allgather(np.int32(flag)).max())


def own_folder(folder: pathlib.Path) -> pathlib.Path:
    """Directory for files that this process does not share: `folder` itself for a single process.

    Each of several processes gets an empty sub-directory, as files left by an interrupted run may
    exist for some processes only.
    """
    if jax.process_count() == 1:
        return folder
    own = folder / f"process_{jax.process_index()}"
    shutil.rmtree(own, ignore_errors=True)
    return own


def columns(batches: np.ndarray) -> np.ndarray:
    """Columns of the global batches [steps, B] that this process trains on."""
    local = batches.shape[1] // jax.process_count()
    return batches[:, jax.process_index() * local :][:, :local]


def shared_out(
    read: Callable[[np.ndarray, int], Iterable], rows: np.ndarray, size: int
) -> Iterator[Any]:
    """Yields the batches of `read(rows, size)`; each process reads its share of the rows only.

    Args:
      read: function of rows [M] and a batch size. Yields a tree of arrays [b, ...] for each batch,
        with one row per image; the last batch may be shorter.
      rows: int [N], rows of all processes.
      size: batch size of all processes together.
    """
    if jax.process_count() == 1:
        return iter(read(rows, size))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    mine = np.concatenate([rows[:0], *(batch[_share(len(batch))] for batch in batches)])
    parts = read(mine, len(_share(size)))
    return (_exchange(part, len(b)) for b, part in zip(batches, parts, strict=True))


def _share(n: int) -> np.ndarray:
    """Rows, of n, that this process has. All have equally many: the last row may be repeated."""
    size = -(-n // jax.process_count())
    return np.minimum(jax.process_index() * size + np.arange(size), n - 1)


def _exchange(tree: Any, n: int) -> Any:
    """Arrays [n, ...], joined from the `_share` of each process."""

    def whole(leaf):
        leaf = np.ascontiguousarray(leaf)
        content = leaf.reshape(len(leaf), -1).view(np.uint8)  # JAX would round float64 to float32
        content = multihost_utils.process_allgather(content, tiled=True)
        return content.view(leaf.dtype).reshape(-1, *leaf.shape[1:])[:n]

    return tree if jax.process_count() == 1 else jax.tree.map(whole, tree)


def to_all(tree: Any) -> Any:
    """Turns a state that each process holds into one global state, for saving.

    A single process saves the copy of its first device. Of a state on several devices Orbax would
    cut each array into a part per device, and compile a program for each part.
    """
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else x, tree)
    return multihost_utils.host_local_array_to_global_array(tree, _mesh(), PartitionSpec())


def to_own(tree: Any) -> Any:
    """The inverse of `to_all`."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.global_array_to_host_local_array(tree, _mesh(), PartitionSpec())


def of_all() -> jax.sharding.Sharding:
    """Sharding of the leaves of `to_all`: all devices, or the first one of a single process."""
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(_mesh(), PartitionSpec())


def step(function: Callable, kind: str) -> Callable:
    """Compiles `function(state, batch, weight, axis_name=...) -> state`.

    Args:
      function: pure function; reduces over the batch with `total(..., axis_name)`.
      kind: "pmap" or "jit".

    Returns:
      `(state, batch, weight) -> state`. `weight` and the leaves of `batch` have the same leading
      size, a multiple of the number of devices.
    """
    return _compile(function, kind, shared=1, axis=0, reduces=True)


def epoch(function: Callable, kind: str) -> Callable:
    """Compiles `function(state, cache, index, weight, axis_name=...) -> state`.

    Like `step`, for `index` and `weight` of shape [steps, B], which are split along B. Every device
    has the whole `cache`.
    """
    return _compile(function, kind, shared=2, axis=1, reduces=True)


def epochs(function: Callable, kind: str, n: int) -> Callable:
    """Compiles `function(states, cache, index, weight, axis_name=...) -> states` for n runs.

    Like `epoch`, but all arguments except the cache have a leading axis of n runs. If there is one
    process and its number of devices divides n, each device trains its share of the runs, without
    communication. Otherwise each device has all runs, and they split the batches as in `epoch`.
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
    """Compiles `function(state, batch) -> outputs`, with one output per example.

    Returns:
      `(state, batch) -> outputs`; outputs are numpy arrays with the leading size of `batch`.
      Shorter batches are padded to `batch_size`, so that every call runs the same program. Several
      processes must all pass the whole batch; each computes its share.
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
    """Like `per_example`, for a batch that only this process has: its share of a global batch."""
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


def run_once(function: Callable) -> Callable:
    """`jax.jit` of a function that runs once: on a CPU, it is compiled without optimisation.

    Random numbers take long to compile: the initial state took a third of all compilation.
    """
    if not on_cpu():
        return jax.jit(function)
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})

    def run(*arguments):  # JAX refuses such options while another function is traced
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments))
        return function(*arguments) if traced else compiled(*arguments)

    return run


def split(tree: Any) -> Any:
    """Splits arrays over this process's devices along the first axis, for use with `jax.jit`.

    The size of the first axis must be a multiple of the number of devices.
    """
    return jax.device_put(tree, NamedSharding(_mesh(local=True), PartitionSpec(AXIS)))


def on_devices(tree: Any) -> Any:
    """Copies arrays to each of this process's devices."""
    return _put(tree, NamedSharding(_mesh(local=True), PartitionSpec()))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """`jax.device_put`, without its milliseconds per step for arrays that are there already."""

    def put(leaf):
        is_there = getattr(leaf, "sharding", None) == sharding
        return leaf if is_there else jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree)


def _mesh(local: bool = False) -> Mesh:
    """One-dimensional mesh of all devices, ordered by process, or of this process's devices."""
    devices = jax.local_devices() if local else jax.devices()
    devices = sorted(devices, key=lambda device: device.process_index)
    return Mesh(np.array(devices), (AXIS,), (AxisType.Auto,))


def _compile(function: Callable, kind: str, *, shared: int, axis: int, reduces: bool) -> Callable:
    """Compiles `function(*replicated, *split)` for several devices.

    Args:
      function: pure function. With `reduces` it takes the keyword `axis_name` as well.
      kind: "pmap" or "jit".
      shared: number of leading arguments that are replicated; the others are split.
      axis: axis of the batch in the arguments that are split.
      reduces: True if the result is the same on all devices. The devices are then those of all
        processes, and each process passes its part of the batch. With False the result is split
        along the batch, and the devices are those of this process.
    """
    if kind not in KINDS:
        raise InputError(f"config.parallel is '{kind}'. It must be one of {', '.join(KINDS)}.")
    compiler = _compile_jit if kind == "jit" else _compile_pmap
    return compiler(function, shared, axis, reduces)


def _compile_jit(function: Callable, shared: int, axis: int, reduces: bool) -> Callable:
    mesh = _mesh(local=not reduces)
    whole = PartitionSpec()
    split = PartitionSpec(*[None] * axis, AXIS)
    result = whole if reduces else split

    def call(*arguments):
        return function(*arguments, **({"axis_name": None} if reduces else {}))

    compiled = jax.jit(call, out_shardings=NamedSharding(mesh, result))

    def run(*arguments):
        specs = [whole] * shared + [split] * (len(arguments) - shared)
        if not reduces or jax.process_count() == 1:
            shardings = [NamedSharding(mesh, spec) for spec in specs]
            return compiled(*map(_put, arguments, shardings))
        put = functools.partial(multihost_utils.host_local_array_to_global_array, global_mesh=mesh)
        arguments = [put(a, pspecs=spec) for a, spec in zip(arguments, specs, strict=True)]
        return multihost_utils.global_array_to_host_local_array(compiled(*arguments), mesh, result)

    return run


def _compile_pmap(function: Callable, shared: int, axis: int, reduces: bool) -> Callable:
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
        # pmap would trace and compile another program for a state with another sharding.
        whole = on_devices(arguments[:shared])
        # The 0 is needed: if the first argument has no leaf, pmap (jax 0.10) splits the wrong one.
        out = mapped((whole, 0), jax.tree.map(divide, arguments[shared:]))
        if reduces:
            return out
        return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), out)

    return run
