"""Reader of PyTorch's weight files that runs no code from them.

A .pth file is a pickle, a program that may call any function. `_Machine` executes only the
instructions and the functions that a state dict needs. Memory and time are bounded by the size of
the file.
"""

import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax.numpy as jnp
import numpy as np

from fastflow_jax.errors import InputError, reason
from fastflow_jax.files import stored_members

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_INSTRUCTIONS = 300_000  # the largest state dicts have 30,000
_Load = Callable[[str | int, np.dtype, int], np.ndarray]  # key, type and size of a storage


def read_torch(path: Path) -> Any:
    """Reads a .pth or .pt file: dicts, lists and plain values, with tensors as numpy arrays.

    Reads the zip format of torch 1.6 and later, and the format before it.

    Raises:
      InputError: the file is damaged, or needs more than tensors, dicts and plain values.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        # A read from mapped memory allocates at most the size of the file, for any claimed length.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_legacy(data)
    except Exception as error:  # a hostile file may cause any
        raise InputError(
            f"{path} cannot be read as PyTorch weights: {reason(error)}. Download it again, or "
            "save only its state_dict, best as .safetensors."
        ) from error


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = stored_members(archive, path.stat().st_size)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it must contain one data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("its numbers must be little-endian")
        storages: dict[str | int, np.ndarray] = {}

        def load(key: str | int, dtype: np.dtype, numel: int) -> np.ndarray:
            if key not in storages:
                data = archive.read(members[f"{folder}data/{key}"])
                storages[key] = np.frombuffer(data, dtype)
            return _checked(storages[key], key, dtype, numel)

        return _Machine(load).run(io.BytesIO(archive.read(pickles[0])))


def _read_legacy(data: mmap.mmap) -> Any:
    """Reads the pickles of the old format, and the bytes of the storages after them."""
    storages: dict[str | int, np.ndarray] = {}
    total = 0

    def refuse(key: str | int, dtype: np.dtype, numel: int) -> np.ndarray:
        raise ValueError("it has a tensor in its header")

    def load(key: str | int, dtype: np.dtype, numel: int) -> np.ndarray:
        nonlocal total
        if key not in storages:
            total += numel * dtype.itemsize
            if total > len(data):
                raise ValueError("its tensors claim more bytes than the file has")
            storages[key] = np.empty(numel, dtype)  # filled below; tensors are views of it
        return _checked(storages[key], key, dtype, numel)

    def unpickle(load: _Load = refuse) -> Any:
        return _Machine(load).run(cast(BinaryIO, data))

    if unpickle() != _LEGACY_MAGIC:
        raise ValueError("it does not begin with PyTorch's magic number")
    unpickle()  # version of the format
    if unpickle().get("little_endian") is not True:
        raise ValueError("its numbers must be little-endian")
    loaded = unpickle(load)
    for key in unpickle():
        storage = storages.pop(_checked_key(key))
        numel = int.from_bytes(data.read(8), "little")
        content = data.read(storage.nbytes)
        if numel != storage.size or len(content) != storage.nbytes:
            raise ValueError("it ends too early")
        storage[:] = np.frombuffer(content, storage.dtype)
    if storages:
        raise ValueError(f"the numbers of {len(storages)} tensors are missing")
    return loaded


def _checked(storage: np.ndarray, key: str | int, dtype: np.dtype, numel: int) -> np.ndarray:
    if storage.dtype != dtype or storage.size != numel:
        raise ValueError(f"storage {key!r} has {storage.size} numbers instead of {numel}")
    return storage


def _checked_key(key: Any) -> str | int:
    # The hash of a deeply nested tuple overflows the C stack and ends the process.
    if not isinstance(key, (str, int)):
        raise ValueError("a key is neither text nor a number")
    return key


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    if not (isinstance(storage, np.ndarray) and len(size) == len(stride) <= 8):
        raise ValueError("a tensor needs a storage and at most eight axes")
    if min((offset, *size, *stride)) < 0 or math.prod(size) > storage.size:
        raise ValueError("a tensor is larger than its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) == 0:
        return np.empty(size, storage.dtype)
    if last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps)


def _ordered_dict(pairs: Sequence = ()) -> dict:
    """Returns a dict of (key, value) pairs, as Python 2 pickled an OrderedDict."""
    return {_checked_key(key): value for key, value in pairs}


# The functions and types that a state dict needs, and their replacements.
_GLOBALS = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch Size": lambda sizes: sizes,
    **{f"torch {name}": dtype for name, dtype in _DTYPES.items()},
}


class _Machine:
    """Interpreter of the pickle instructions that a state dict needs.

    `pickle.Unpickler` with `find_class` and `persistent_load` would not bound a hostile file: a
    nested tuple as the key of a dict ends the process (see `_checked_key`), a memo index of 2**27
    takes 2 GB, a length of bytes is allocated before it is read, and BUILD and SETITEM may change
    any object, such as a tensor or a dtype of numpy.
    """

    def __init__(self, load: _Load):
        self.load = load
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.n_pairs = 0  # of all OrderedDicts; a short file can pass one list many times

    def run(self, file: BinaryIO) -> Any:
        """Returns the object of the next pickle in the file."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            name = opcode.name
            if count == _MAX_INSTRUCTIONS:
                raise ValueError("its pickle is too long for weights")
            if name == "STOP":
                return self.stack.pop()
            if name in _NEW:
                self.stack.append(_NEW[name]())
            elif name in _WITH_VALUE:
                self.stack.append(argument)
            elif name in _N_OPERANDS:
                self._combine(name, self._pop(_N_OPERANDS[name]))
            else:
                self._execute(name, argument)

    def _pop(self, n: int | None) -> list:
        """Removes the last `n` objects of the stack, or those after the last mark."""
        if n is None:
            operands, self.stack = self.stack, self.marked.pop()
            return operands
        return [self.stack.pop() for _ in range(n)][::-1]

    def _execute(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO":
                pass
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise ValueError(f"it names {argument.replace(' ', '.')}, which is not allowed")
                self.stack.append(_GLOBALS[argument])
            case _:
                raise ValueError(f"its pickle has the instruction {name}, which is not allowed")

    def _combine(self, name: str, operands: list) -> None:
        match name:
            case "APPEND" | "APPENDS":
                if not isinstance(self.stack[-1], list):
                    raise ValueError("it appends to an object that is not a list")
                self.stack[-1].extend(operands)
            case "SETITEM" | "SETITEMS":
                if not isinstance(self.stack[-1], dict):
                    raise ValueError("it sets an item of an object that is not a dict")
                keys = map(_checked_key, operands[::2])
                self.stack[-1].update(zip(keys, operands[1::2], strict=True))
            case "REDUCE":
                self.stack.append(self._call(*operands))
            case "BINPERSID":
                kind, dtype, key, _, numel, *view = operands[0]
                if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
                    raise ValueError("it refers to an object that is not the storage of a tensor")
                self.stack.append(self.load(_checked_key(key), dtype, numel))
            case "BUILD":  # sets attributes, such as the versions of modules
                pass
            case _:
                self.stack.append(tuple(operands))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not any(function is allowed for allowed in _GLOBALS.values()):
            raise ValueError("it calls an object that is not a function")
        if function is _ordered_dict:
            self.n_pairs += sum(map(len, arguments))
            if self.n_pairs > _MAX_INSTRUCTIONS:
                raise ValueError("its dicts are too large for weights")
        return function(*arguments)


_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_WITH_VALUE = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_WITH_VALUE |= {"BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
_N_OPERANDS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}  # None: up to the mark
_N_OPERANDS |= {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None}
_N_OPERANDS |= {"REDUCE": 2, "BUILD": 1, "BINPERSID": 1}
