"""Changes of files: bytes, numbers, JSON, archives and the chunks of image formats."""

import copy
import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Change = Callable[[bytes, Random, Sequence[bytes]], bytes]

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a" * 5000,
        "../../escaped",
        "/tmp/escaped",
        "~nobody/x",
        "\x1b[31mred",
        "%s%n",
    ),
    *("\ud800", "é\u202e", "a\nb", "nan", "1e999", "-1", "file:///etc/hostname", "gs://bucket/x"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), [], {}, [[]], [None] * 3, {"": None}, [0] * 1000),
)
_DEEP = "@deep@"  # becomes a nested list that no parser follows to its end


def of_bytes(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes, removes, repeats and inserts bytes, or joins two files."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 16, 64, 512)))
        match rng.randrange(8):
            case 0 if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 1 | 2:
                number = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS))
                size = rng.choice((1, 2, 4, 8))
                number = number[:size] if rng.random() < 0.5 else number[-size:]
                content[start : start + size] = number
            case 3:
                del content[start:end]
            case 4:
                del content[start:]
            case 5:
                content[start:start] = content[start:end] * rng.choice((1, 2, 50))
            case 6:
                content[start:end] = rng.randbytes(end - start + rng.randrange(3))
            case _:
                other = rng.choice(others) if others else bytes(content)
                content[start:] = other[rng.randrange(len(other) + 1) :]
    return bytes(content[: 2**22])


def of_text(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Replaces numbers, words and lines of a text, or changes its bytes."""
    text = data.decode("utf-8", "surrogateescape")
    words = list(re.finditer(r"[^\s,;:=\"'{}\[\]()]+", text))
    lines = text.splitlines(keepends=True)
    if not words or rng.random() < 0.3:
        return of_bytes(data, rng, others)
    word = rng.choice(words)
    match rng.randrange(4):
        case 0:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "".join(lines)
        case 1:
            text = text[: word.start()] + text[word.end() :]
        case _:
            new = rng.choice((*TEXTS, *map(str, VALUES[:14])))
            text = text[: word.start()] + new + text[word.end() :]
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def of_value(value: Any, rng: Random) -> Any:
    """Replaces, removes, renames or repeats one part of a JSON value; the argument is unchanged."""
    root = [copy.deepcopy(value)]
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    match rng.randrange(6):
        case 0 if holder is not root:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        case 2:
            holder[key] = [holder[key]] * rng.choice((1, 2, 100))
        case 3:
            holder[key] = rng.choice((*TEXTS, _DEEP))
        case _:
            holder[key] = rng.choice(VALUES)
    return root[0]


def to_json(value: Any) -> bytes:
    """A value of `of_value` as JSON."""
    deep = "[" * 100_000
    return json.dumps(value).replace(f'"{_DEEP}"', deep).encode()


def of_json(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes a value of a JSON file; sometimes its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(data, rng, others)
    if rng.random() < 0.15:
        return of_text(data, rng, others)
    return to_json(of_value(value, rng))


def of_zip(inner: Callable[[str, bytes, Random], bytes]) -> Change:
    """Changes the members of a .zip file, and writes them again with correct checksums.

    Args:
      inner: changes the content of a member, given its name.
    """

    def change(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
        try:
            files = unpacked(data)
        except Exception:  # the result of an earlier change
            return of_bytes(data, rng, others)
        if not files or rng.random() < 0.2:
            return of_bytes(data, rng, others)
        name = rng.choice(list(files))
        if rng.random() < 0.7:
            files[name] = inner(name, files[name], rng)
            return packed(files)
        return _odd_zip(files, name, rng)

    return change


def _odd_zip(files: dict[str, bytes], chosen: str, rng: Random) -> bytes:
    """A .zip file with one odd member: a link, a bomb, a path outside, a copy, a false size."""
    buffer, kind = io.BytesIO(), rng.randrange(8)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o644 << 16
            if name == chosen:
                if kind == 0:
                    info.filename = rng.choice(
                        ("../escaped", "/tmp/escaped", "a/../../escaped", "é")
                    )
                elif kind == 1:
                    info.external_attr, content = 0o120777 << 16, b"/etc/hostname"
                elif kind == 2:
                    info.compress_type, content = zipfile.ZIP_DEFLATED, bytes(2**24)
                elif kind == 3:
                    info.compress_type = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
                elif kind == 4:
                    info.filename = rng.choice((name + "/", name + "/x", "\0", "CON"))
            archive.writestr(info, content)
            if name == chosen and kind == 5:
                archive.filelist.append(copy.copy(archive.filelist[-1]))
    data = bytearray(buffer.getvalue())
    if kind in (6, 7):  # of the local header, or of the directory: flags, method, sizes
        signature, fields = rng.choice(((b"PK\3\4", 6), (b"PK\1\2", 8)))
        at = rng.choice([m.start() for m in re.finditer(re.escape(signature), data)] or [0])
        at += fields + rng.choice((0, 2, 8, 12, 16, 20, 22))
        data[at : at + 2] = struct.pack("<H", rng.choice((0, 1, 8, 99, 0x0801, 0xFFFF)))
    return bytes(data)


def packed(files: dict[str, bytes]) -> bytes:
    """Files by name as a .zip file without compression."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The inverse of `packed`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def of_tar(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes a member of a .tar file, which may be compressed."""
    if rng.random() < 0.3:
        return of_bytes(data, rng, others)
    buffer = io.BytesIO()
    mode, format = rng.choice(("w", "w:gz", "w:xz", "w:bz2")), rng.choice((0, 1, 2))
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(data)) as old,
            tarfile.open(fileobj=buffer, mode=mode, format=format) as new,  # type: ignore[call-overload]
        ):
            for member in old.getmembers():
                content = (file := old.extractfile(member)) and file.read()
                for odd in _odd_members(member, rng):
                    odd.size = len(content or b"") if odd.isreg() else 0
                    new.addfile(odd, io.BytesIO(content) if content and odd.isreg() else None)
    except Exception:  # the result of an earlier change, or a member that cannot be written
        return of_bytes(data, rng, others)
    return (
        of_bytes(buffer.getvalue(), rng)
        if mode == "w" and rng.random() < 0.5
        else buffer.getvalue()
    )


def _odd_members(member: tarfile.TarInfo, rng: Random) -> list[tarfile.TarInfo]:
    odd = copy.copy(member)
    match rng.randrange(9):
        case 0:
            odd.name = rng.choice(
                ("../escaped", "/tmp/escaped", "a/../../escaped", "a\nb", "x" * 300)
            )
        case 1:
            odd.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))
            odd.linkname = rng.choice(("/etc/hostname", "..", "../../..", odd.name, "missing"))
        case 2:
            odd.type = rng.choice((tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"))
        case 3:
            odd.mtime = rng.choice((-1, 2**33, 2**62, 1e300, 0.5))
        case 4:
            odd.mode = rng.choice((0, 0o7777, 0o000))
        case 5:
            odd.pax_headers = {rng.choice(("size", "path", "mtime", "uid", "GNU.sparse.map", "é")):
                               rng.choice(("", "x", "-1", "1" * 400, "../escaped"))}  # fmt: skip
        case 6:
            return [odd, copy.copy(odd)]
    return [odd]


def of_png(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes, repeats or adds a chunk of a PNG file, and corrects its checksum."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    if not chunks:
        return of_bytes(data, rng, others)
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    match rng.randrange(5):
        case 0:
            chunks.insert(i, list(chunks[i]))
        case 1:
            compressed = zlib.compress(bytes(rng.choice((0, 100, 2**24))))
            added = (
                (b"zTXt", b"Comment\0\0" + compressed),
                (b"iCCP", b"icc\0\0" + compressed),
                (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + compressed),
                (b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\1" + rng.randbytes(10)),
                (b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 300)))),
                (b"acTL", struct.pack(">II", rng.choice(NUMBERS[:-1]), 0)),
                (b"fcTL", rng.randbytes(26)),
            )
            chunks.insert(rng.randrange(1, len(chunks) + 1), list(rng.choice(added)))
        case 2 if kind == b"IDAT":
            try:
                chunks[i][1] = zlib.compress(of_bytes(zlib.decompress(content), rng))
            except zlib.error:
                chunks[i][1] = of_bytes(content, rng)
        case 3 if len(content) >= 8:
            side = rng.choice((0, 4))
            number = struct.pack(">I", rng.choice(NUMBERS[:-1]))
            chunks[0][1] = chunks[0][1][:side] + number + chunks[0][1][side + 4 :]
        case _:
            chunks[i][1] = of_bytes(content, rng)
    return data[:8] + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def of_jpeg(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes or adds a segment of a JPEG file, with the right length."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        segments.append([data[at + 1], data[at + 4 : at + 2 + length]])
        at += 2 + length
    if not segments:
        return of_bytes(data, rng, others)
    i = rng.randrange(len(segments))
    match rng.randrange(3):
        case 0:
            exif = b"Exif\0\0" + rng.choice((b"II*\0", b"MM\0*")) + rng.randbytes(rng.randrange(60))
            icc = b"ICC_PROFILE\0" + rng.randbytes(rng.randrange(150))
            mpf = b"MPF\0" + rng.randbytes(rng.randrange(90))
            added = ((0xE1, exif), (0xE2, icc), (0xE2, mpf), (0xED, b"Photoshop 3.0\0" + exif))
            segments.insert(rng.randrange(len(segments) + 1), list(rng.choice(added)))
        case 1:
            segments.insert(i, list(segments[i]))
        case _:
            segments[i][1] = of_bytes(segments[i][1], rng)[:65533]
    head = b"".join(
        bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content
        for kind, content in segments
    )
    return data[:2] + head + data[at:]


def of_safetensors(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes the header of a .safetensors file, and corrects its length."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError, RecursionError):
        return of_bytes(data, rng, others)
    if rng.random() < 0.3:
        return of_bytes(data, rng, others)
    changed = to_json(of_value(header, rng))
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]
