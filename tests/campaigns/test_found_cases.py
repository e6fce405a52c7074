"""Cases that the campaign of hostile input found, in their smallest form."""

import json
import pathlib
import struct
import tarfile
import zipfile

import jax
import numpy as np
import pytest

from fastflow_jax.config import default, fill, from_plain
from fastflow_jax.data import manifest, polygons
from fastflow_jax.data.arrays import read_image
from fastflow_jax.data.tfds.manual import unpack
from fastflow_jax.errors import InputError
from fastflow_jax.export.page import read_runtime
from fastflow_jax.exported import Exported
from fastflow_jax.features import cache
from fastflow_jax.files import expanded, parse_json, read_arrays, read_lines, write_arrays
from fastflow_jax.runs import saved

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\ud800 \u202e \0", r"\ud800 \u202e \x00"),
        ("one\ntwo é", "one\ntwo é"),
        ("x" * 5000 + " end.", "x" * 700 + " ... " + "x" * 245 + " end."),
    ],
)
def test_a_message_shows_text_of_a_file_harmlessly(text, shown):
    assert str(InputError(text)) == shown


def npy(header, content=b""):
    """A .npy file with a header of any text."""
    header = header.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


ARRAYS = {
    "open bracket": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,"),
    "too large": npy(
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**60},)}}\n", bytes(8)
    ),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", bytes(8)),
    "no array": b"",
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_damaged_arrays_are_refused(content, tmp_path):
    file = tmp_path / "held_out.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("scores.npy", content)
    with pytest.raises(InputError, match=r"held_out\.npz is damaged .*\. Restore it"):
        read_arrays(file)


def test_an_archive_of_arrays_with_a_wrong_offset_is_refused(tmp_path):
    file = tmp_path / "held_out.npz"
    write_arrays(file, {"scores": np.zeros(3, np.float32)})
    data = bytearray(file.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 42 : entry + 46] = b"\xff" * 4
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"held_out\.npz is damaged"):
        read_arrays(file)


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    given = {
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float16),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "flags": np.array([True, False]),
    }
    write_arrays(tmp_path / "a.npz", given)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == given.keys()
    with np.load(tmp_path / "a.npz") as expected:
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], strict=True)


def test_only_objects_are_lines_of_a_file_of_json_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        b'{"epoch": 1}',
        b"5",
        b"[1]",
        DEEP.encode(),
        b'{"\xff": 1}',
        b'{"epoch"',
        b'{"epoch": 2}',
    ]
    file.write_bytes(b"\n".join(lines))
    assert read_lines(file) == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("content", [DEEP, "\udcff", None])
def test_damaged_json_is_refused(content, tmp_path):
    file = tmp_path / "detector.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(InputError, match=r"detector\.json is damaged"):
        parse_json(file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("list.json", DEEP, "cannot be read"),
        ("list.csv", "path,split,label\n" + "x" * 200_000, "cannot be read .field larger"),
        ("list.json", [{"mask": [["m.png"]]}], r"entry 1: mask is \[\['m\.png'\]\]\. It must be"),
        ("list.json", [{"mask": 3}], "entry 1: mask is 3"),
        ("list.json", [{"path": "x" * 5000}], "does not exist"),
    ],
)
def test_damaged_manifests_are_refused(name, content, says, tmp_path):
    if not isinstance(content, str):
        row = {"path": "a.png", "split": "train", "label": "good"}
        content = json.dumps([row | each for each in content])
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        manifest.read(tmp_path / name, None)


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        {"shapes": [{"points": [[0, 0], [10**400, 1], [2, 2]]}]},
        {"shapes": [{"points": [[0, 0], [float("inf"), 1], [2, 2]]}]},
        {"images": [], "annotations": [], "counts": [2**40]},
        {"images": [], "annotations": [], "counts": [-1, 31]},
    ],
)
def test_damaged_polygons_are_refused(content, tmp_path):
    file, image = tmp_path / "a.json", tmp_path / "a.png"
    if isinstance(content, dict) and "counts" in content:
        content["images"] = [{"id": 1, "file_name": "a.png"}]
        runs = {"counts": content.pop("counts"), "size": [5, 6]}
        content["annotations"] = [{"image_id": 1, "segmentation": runs}]
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=r"a\.json (is damaged|cannot be read)"):
        polygons.draw(file, image, (5, 6))


def member(name, **fields):
    """A member of a .tar file."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (member("set/a", mtime=1e300), "is damaged"),
        (member("set/a", type=tarfile.LNKTYPE, linkname="set/b"), "is damaged"),
        (member("../a"), "is damaged"),
        (member("set/a", type=tarfile.SYMTYPE, linkname="../.."), "is damaged"),
    ],
)
def test_odd_members_of_a_tar_file_are_refused(info, says, tmp_path):
    file = tmp_path / "here/set.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    with pytest.raises(InputError, match=says):
        unpack(file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".unpacking", "here", "set.tar"]


def test_a_zip_file_with_a_nameless_member_is_refused(tmp_path):
    file = tmp_path / "set.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"")
    file.write_bytes(file.read_bytes().replace(b"a", b"\0"))
    with pytest.raises(InputError, match="is damaged"):
        unpack(file)
    assert {path.name for path in tmp_path.iterdir()} == {"set.zip", ".unpacking"}


def test_a_runtime_of_directories_is_refused(tmp_path):
    file = tmp_path / "runtime.tgz"
    with tarfile.open(file, "w:gz") as archive:
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            archive.addfile(member(f"package/dist/{name}", type=tarfile.DIRTYPE))
    with pytest.raises(InputError, match=r"runtime\.tgz is not the npm package"):
        read_runtime(pathlib.Path(file))


def test_an_image_whose_path_has_a_nul_is_refused():
    with pytest.raises(InputError, match=r"cannot be read: embedded null byte\. Check its path"):
        read_image("a\0.png")


def test_a_path_with_a_nul_is_refused():
    with pytest.raises(InputError, match=r"The path '~\\x00' has a NUL character"):
        expanded("~\0")


@pytest.mark.parametrize("name", ["record.jsonl", "scale_0.raw"])
def test_a_link_among_cached_features_is_replaced(name, tmp_path):
    """Features would be written to the file that it leads to."""
    features = np.arange(8, dtype=np.float32).reshape(4, 1, 1, 2)

    def load():
        return cache.load_or_compute(
            lambda rows: iter([(features[rows],)]),
            {},
            list("abcd"),
            [jax.ShapeDtypeStruct((4, 1, 1, 2), np.float32)],
            block=4,
            location="disk",
            folder=tmp_path / "features",
            title="features",
        )

    load()
    other = tmp_path / "other"
    (tmp_path / "features" / name).rename(other)
    (tmp_path / "features" / name).symlink_to(other)
    before = other.read_bytes()
    (tmp_path / "features/scale_0.raw").unlink()
    (found,) = load()
    np.testing.assert_array_equal(found, features)
    assert other.read_bytes() == before
    assert not (tmp_path / "features" / name).is_symlink()


@pytest.mark.parametrize(
    "held_out",
    [
        {"scores": [0.1, 0.2], "groups": [0]},
        {"scores": [0.1, 0.2], "groups": [None, None]},
        {"scores": [0.1, 0.2], "kinds": 3},
    ],
)
def test_an_exported_detector_of_odd_groups_is_refused(held_out, export, tmp_path):
    file = export(tmp_path / "tiny.onnx", held_out=held_out)
    with pytest.raises(InputError, match=r"The metadata of .*tiny\.onnx are damaged"):
        Exported(file)


@pytest.mark.parametrize("size", [{"height": 1}, {"width": 8.0}, {"height": float("nan")}])
def test_an_exported_detector_of_another_size_than_stated_is_refused(size, export, tmp_path):
    about = {"height": 8, "width": 8, "resize": "square"} | size
    file = export(tmp_path / "tiny.onnx", input=about)
    with pytest.raises(InputError, match=r"The metadata of .*tiny\.onnx are damaged .images of"):
        Exported(file)


@pytest.mark.parametrize(
    ("plain", "says"), [(5, "not an object"), ({"": None}, "there is no field ''")]
)
def test_a_damaged_configuration_is_refused(plain, says):
    with pytest.raises(InputError, match=says):
        from_plain(plain)


def test_a_run_whose_record_is_damaged_is_refused(tmp_path):
    record = {"config": 5, "seed": 0, "weights": {}, "training": ".", "thresholds": {}}
    (tmp_path / "detector.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"detector\.json is damaged \('image'\)"):
        saved.read(tmp_path)


def test_a_polygon_far_from_the_image_marks_nothing():
    polygon = np.array([[0, 1e300], [1, 1e301], [2, 1e302]])
    assert not polygons.fill(polygon, (5, 6)).any()


def test_a_list_is_not_the_name_of_a_layer():
    config = default()
    config.layers = ([],)
    with pytest.raises(InputError, match=r"has no layer \[\]\. Choose from"):
        fill(config)
