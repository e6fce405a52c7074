"""The open inference protocol: metadata, tensors in JSON and binary, errors."""

import json

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
IMAGES[0] = 255
MAPS = IMAGES.mean(-1) / 255
DATATYPES = {"FP32": np.dtype("<f4"), "BOOL": np.dtype(bool)}
EXPECTED = {
    "score": MAPS.mean((1, 2)),
    "anomaly_map": MAPS,
    "p_value": [(1 + sum(h >= s for h in (0.1, 0.2, 0.3, 0.4))) / 5 for s in MAPS.mean((1, 2))],
    "is_anomalous": MAPS.mean((1, 2)) > 0.5,
    "mask": MAPS > 0.75,
}


def tensor(**changes):
    """The input of a request as JSON."""
    given = {"name": "images", "datatype": "UINT8", "shape": [*IMAGES.shape]}
    return given | {"data": IMAGES.ravel().tolist()} | changes


def infer(client, inputs=None, model="tiny", **content):
    return client.post(
        f"/v2/models/{model}/infer", json={"inputs": inputs or [tensor()], **content}
    )


def arrays(outputs):
    return {
        each["name"]: np.reshape(each["data"], each["shape"]).astype(DATATYPES[each["datatype"]])
        for each in outputs
    }


def test_all_outputs_of_a_batch(client):
    answer = infer(client, id="7").json()
    assert answer["id"] == "7"
    text = json.dumps({"inputs": [tensor()], "id": float("nan")})
    assert "id" not in client.post("/v2/models/tiny/infer", content=text).json()
    assert answer["model_name"] == "tiny"
    found = arrays(answer["outputs"])
    assert [*found] == [*EXPECTED]
    for name, array in EXPECTED.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6)


def test_nested_data_and_some_outputs(client):
    wanted = [{"name": "is_anomalous"}, {"name": "score"}]
    answer = infer(client, [tensor(data=IMAGES.tolist())], outputs=wanted).json()
    found = arrays(answer["outputs"])
    assert [*found] == ["is_anomalous", "score"]
    np.testing.assert_allclose(found["score"], EXPECTED["score"], rtol=1e-6)


@pytest.mark.parametrize("all_binary", [True, False])
def test_binary_tensors(client, all_binary):
    given = tensor(parameters={"binary_data_size": IMAGES.nbytes})
    del given["data"]
    content = {"inputs": [given]}
    if all_binary:
        content["parameters"] = {"binary_data_output": True}
    else:
        binary = {"parameters": {"binary_data": True}}
        content["outputs"] = [{"name": "score"}, {"name": "mask"} | binary]
    header = json.dumps(content).encode()
    response = client.post(
        "/v2/models/tiny/infer",
        content=header + IMAGES.tobytes(),
        headers={"inference-header-content-length": str(len(header))},
    )
    length = int(response.headers["inference-header-content-length"])
    outputs, rest = json.loads(response.content[:length])["outputs"], response.content[length:]
    assert [each["name"] for each in outputs] == ([*EXPECTED] if all_binary else ["score", "mask"])
    for each in outputs:
        if "parameters" in each:
            size, kind = each["parameters"]["binary_data_size"], DATATYPES[each["datatype"]]
            array, rest = np.frombuffer(rest[:size], kind).reshape(each["shape"]), rest[size:]
        else:
            assert each["name"] == "score"
            array = np.array(each["data"])
        np.testing.assert_allclose(array, EXPECTED[each["name"]], rtol=1e-6)
    assert not rest


def test_metadata(client):
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    about = client.get("/v2/models/tiny").json()
    (version,) = about["versions"]
    assert about["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}]
    described = {each["name"]: (each["datatype"], each["shape"]) for each in about["outputs"]}
    for each in infer(client).json()["outputs"]:
        datatype, shape = described.pop(each["name"])
        assert datatype == each["datatype"]
        assert shape[1:] == each["shape"][1:]
    assert not described
    for path in ("", "/ready", f"/versions/{version}", f"/versions/{version}/ready"):
        assert client.get(f"/v2/models/tiny{path}").status_code == 200
    assert client.get("/v2/models/tiny/versions/1").status_code == 404
    assert client.get("/v2/models/other").status_code == 404


BAD = {
    "no inputs": {"inputs": []},
    "inputs that are no list": {"inputs": {"images": 1}},
    "two inputs": {"inputs": [tensor(), tensor()]},
    "another name": {"inputs": [tensor(name="image")]},
    "another datatype": {"inputs": [tensor(datatype="FP32")]},
    "another size": {"inputs": [tensor(shape=[5, 8, 9, 3])]},
    "no shape": {"inputs": [tensor(shape=None)]},
    "an empty batch": {"inputs": [tensor(shape=[0, 8, 8, 3], data=[])]},
    "a negative shape": {"inputs": [tensor(shape=[-1, 8, 8, 3])]},
    "too few values": {"inputs": [tensor(data=[1, 2, 3])]},
    "ragged values": {"inputs": [tensor(data=[[1], [2, 3]])]},
    "values above 255": {"inputs": [tensor(data=[256] * IMAGES.size)]},
    "negative values": {"inputs": [tensor(data=[-1] * IMAGES.size)]},
    "fractions": {"inputs": [tensor(data=[0.5] * IMAGES.size)]},
    "text": {"inputs": [tensor(data="text")]},
    "no data": {"inputs": [tensor(data=None)]},
    "too many images": {"inputs": [tensor(shape=[65, 8, 8, 3], data=[0] * 65 * 192)]},
    "an output without a name": {"inputs": [tensor()], "outputs": [{"name": ["score"]}]},
    "an unknown output": {"inputs": [tensor()], "outputs": [{"name": "label"}]},
    "an output twice": {"inputs": [tensor()], "outputs": [{"name": "score"}, {"name": "score"}]},
    "outputs that are no list": {"inputs": [tensor()], "outputs": "score"},
    "a list": [],
}


@pytest.mark.parametrize("kind", BAD)
def test_invalid_requests_have_one_message(client, kind):
    response = client.post("/v2/models/tiny/infer", json=BAD[kind])
    assert response.status_code == 400
    assert [*response.json()] == ["error"]


def test_content_that_is_not_json(client):
    def status(content, **headers):
        response = client.post("/v2/models/tiny/infer", content=content, headers=headers)
        assert response.json()["error"]
        return response.status_code

    assert status(b"\xff") == status(b"") == status(b"[" * 100_000) == 400
    assert status(b"{}", **{"inference-header-content-length": "3"}) == 400
    assert status(b"{}", **{"inference-header-content-length": "-1"}) == 400
    assert status(b"{}", **{"inference-header-content-length": "1" * 5000}) == 400
    assert infer(client, model="other").status_code == 404
