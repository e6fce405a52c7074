"""Reads PyTorch's weight files with numpy, and runs nothing that stands in them.

A .pth file is a pickle, a small program that may call anything. Here its instructions are decoded
by `pickletools` and obeyed only as far as building dicts, lists and tensors goes; it may name the
few globals that a state dict needs and no other. Memory and time are bounded by the file's size.
"""

import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from fastflow_jax.errors import InputError

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


def read_torch(path: Path) -> Any:
    """The object in a .pth or .pt file: dicts and lists, tensors as numpy arrays.

    Reads the zip format of torch 1.6 and later and the format before it.

    Raises:
      InputError: the file is damaged, or needs more than tensors, dicts and plain values.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        # Mapped, a read of more bytes than there are returns what there is and allocates no more.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_legacy(data)
    except Exception as error:  # whatever a hostile file provokes
        reason = ascii(str(error) or type(error).__name__)[1:200].rstrip("'\"")
        raise InputError(
            f"{path}: cannot be read as PyTorch weights: {reason}. "
            "If it was downloaded in full, save its state_dict alone, best as .safetensors."
        ) from error


def stored_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip file that holds arrays as they are.

    Raises:
      ValueError: a member is compressed, or they claim more bytes than the file has: either could
        unpack to any size.
    """
    members = {info.filename: info for info in archive.infolist()}
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name!r} is compressed; only plain archives are read")
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError("its members claim more bytes than the file has")
    return members


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = stored_members(archive, path.stat().st_size)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("there is not one data.pkl in it")
        folder = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        storages = {}

        def load(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
            if key not in storages:
                data = archive.read(members[f"{folder}data/{key}"])
                storages[key] = np.frombuffer(data, dtype)
            return _checked(storages[key], key, dtype, numel)

        return _obey(io.BytesIO(archive.read(pickles[0])), load)


def _read_legacy(file: mmap.mmap) -> Any:
    """Magic number, protocol, system, the object, the keys of its storages, their bytes."""
    storages = {}
    total = 0

    def nothing(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        raise ValueError("a tensor stands where none may")

    def load(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        nonlocal total
        if key not in storages:
            total += numel * dtype.itemsize
            if total > len(file):
                raise ValueError("its tensors claim more bytes than the file has")
            storages[key] = np.empty(numel, dtype)  # filled below; tensors are views of it
        return _checked(storages[key], key, dtype, numel)

    if _obey(file, nothing) != _LEGACY_MAGIC:
        raise ValueError("it does not begin as such a file does")
    _obey(file, nothing)  # protocol
    if _obey(file, nothing).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    loaded = _obey(file, load)
    for key in _obey(file, nothing):
        storage = storages.pop(_text(key))
        numel = int.from_bytes(file.read(8), "little")
        data = file.read(storage.nbytes)
        if numel != storage.size or len(data) != storage.nbytes:
            raise ValueError("it ends too early; was it downloaded in full?")
        storage[:] = np.frombuffer(data, storage.dtype)
    if storages:
        raise ValueError(f"the numbers of {len(storages)} tensors are missing")
    return loaded


def _checked(storage: np.ndarray, key: str, dtype: np.dtype, numel: int) -> np.ndarray:
    if storage.dtype != dtype or storage.size != numel:
        raise ValueError(f"storage {key!r} has {storage.size} numbers, {numel} are claimed")
    return storage


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    if not (isinstance(storage, np.ndarray) and len(size) == len(stride) <= 8):
        raise ValueError("a tensor is built of something else")
    if min((offset, *size, *stride)) < 0 or math.prod(size) > storage.size:
        raise ValueError("a tensor is larger than its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) == 0:
        return np.empty(size, storage.dtype)
    if last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps)


def _ordered_dict(pairs: list = ()) -> dict:
    """Python 2 wrote an OrderedDict as its list of pairs."""
    target: dict = {}
    for key, value in pairs:
        _set_items(target, [key, value])
    return target


# The globals that a state dict needs, and what stands for them here.
_GLOBALS = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch Size": lambda sizes: sizes,
    **{f"torch {name}": dtype for name, dtype in _DTYPES.items()},
}


def _text(key: Any) -> str | int:
    # Hashing a tuple nested a million deep overflows the stack, so keys are plain.
    if not isinstance(key, (str, int)):
        raise ValueError("a key is neither text nor a number")
    return key


def _set_items(target: Any, items: list) -> None:
    if not isinstance(target, dict):
        raise ValueError("it sets an item of something that is no dict")
    target.update(zip(map(_text, items[::2]), items[1::2], strict=True))


def _extend(target: Any, items: list) -> None:
    if not isinstance(target, list):
        raise ValueError("it appends to something that is no list")
    target.extend(items)


def _obey(file: BinaryIO, load: Callable[[str, np.dtype, int], np.ndarray]) -> Any:
    """Runs the next pickle in the file; `load` gives the storage of a key."""
    stack: list = []
    marked: list[list] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    pairs = 0  # that OrderedDicts were made of: one list can be handed in any number of times
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == _MAX_INSTRUCTIONS:
            raise ValueError("its pickle is too long for weights")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marked.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE":
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS":
                items, stack = stack, marked.pop()
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                items = [stack.pop(-2), stack.pop()]
                _set_items(stack[-1], items)
            case "SETITEMS":
                items, stack = stack, marked.pop()
                _set_items(stack[-1], items)
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise ValueError(f"it names {argument.replace(' ', '.')}, which is not allowed")
                stack.append(_GLOBALS[argument])
            case "REDUCE":
                arguments = stack.pop()
                function = stack.pop()
                if not any(function is allowed for allowed in _GLOBALS.values()):
                    raise ValueError("it calls something that is no global")
                if function is _ordered_dict:
                    pairs += sum(map(len, arguments))
                    if pairs > _MAX_INSTRUCTIONS:
                        raise ValueError("its dicts are too large for weights")
                stack.append(function(*arguments))
            case "BUILD":  # attributes of an OrderedDict, such as the versions of modules
                stack.pop()
            case "BINPERSID":
                kind, dtype, key, _, numel, *view = stack.pop()
                if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
                    raise ValueError("it holds something else than the storage of a tensor")
                stack.append(load(_text(key), dtype, numel))
            case name:
                raise ValueError(f"its pickle has an instruction {name}, which weights never need")
