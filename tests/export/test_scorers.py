"""Exported scorers equal JAX: scores, maps and likelihoods, with and without padding."""

import jax
import numpy as np
import pytest

from fastflow_jax.backbones import create_backbone
from fastflow_jax.config import default, fill
from fastflow_jax.detectors import base
from fastflow_jax.detectors.calibration import identity
from fastflow_jax.detectors.fastflow.scorer import FastFlowScorer, flow_model
from fastflow_jax.features.extract import cached_features
from fastflow_jax.scoring import pure_function, state_of
from fastflow_jax.training.context import FitContext

SIZE = (32, 48)
RNG = np.random.default_rng(0)
FEATURES = tuple(
    (2 * RNG.normal(size=(14, h, w, c)) + 1).astype(np.float16)
    for h, w, c in ((16, 24, 6), (8, 12, 8))
)
TOLERANCE = {"score": 1e-4, "anomaly_map": 1e-3, "log_likelihood": 1e-4}
PUBLISHED = {
    "flow.norm": "layer",
    "flow.affine": "softplus",
    "flow.coupling": "double",
    "map.form": "probability",
    "map.bank": 0,
    "score.form": "top_k",
}
CASES = {
    "fastflow": ("fastflow", {"flow.steps": 2, "map.bank": 30, "flow.zero_init": False}),
    "fastflow as published": ("fastflow", {"flow.steps": 2, **PUBLISHED}),
    "knn": ("knn", {"knn.points": 50}),
    "knn of several": ("knn", {"knn.points": 50, "knn.neighbours": 3, "knn.average": True}),
    "gaussian": ("gaussian", {}),
    "gaussian per location": (
        "gaussian",
        {"gaussian.per_location": True, "gaussian.channels": 5},
    ),
    "subspace": ("subspace", {}),
    "patchcore": ("patchcore", {"patchcore.dimension": 16, "patchcore.projection": 8}),
    "patchcore re-weighted": (
        "patchcore",
        {
            "patchcore.dimension": 16,
            "patchcore.projection": 8,
            "patchcore.neighbours": 3,
            "patchcore.reweight": 4,
        },
    ),
    "cflow": ("cflow", {"cflow.steps": 2, "cflow.encoding": 8}),
}
LARGEST = {"fastflow": (300, 8), "knn": (90, 0), "patchcore": (70, 3), "cflow": (140, 6)}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Scorers by the name of the case, each fitted once."""
    scorers = {}

    def fit(case):
        if case not in scorers:
            name, fields = CASES[case]
            config = default()
            config.detector, config.image_size, config.batch_size = name, SIZE, 4
            config.layers = ("blocks.1", "blocks.2")
            if name in ("fastflow", "cflow"):
                config.train.epochs, config.train.batch_size = 1, 4
            config.update_from_flattened_dict(fields)
            training = cached_features(tuple(m[:9] for m in FEATURES))
            holdout = tuple(m[9:] for m in FEATURES)
            folder = tmp_path_factory.mktemp(name)
            context = FitContext(fill(config), training, folder, 1, holdout)
            scorers[case] = base.method(name).fit(context)
        return scorers[case]

    return fit


def pure(scorer):
    """The function of a scorer from features by name to its results by name."""
    state = scorer.arrays()
    function = scorer.with_likelihood or scorer.function

    def run(fine, coarse, valid=None):
        found = function(scorer.config, SIZE, state, ((fine, coarse), valid))
        return dict(zip(("score", "anomaly_map", "log_likelihood"), found, strict=False))

    return run


@pytest.mark.parametrize("case", CASES)
def test_equals_jax(agree, fitted, case):
    arrays = {"fine": FEATURES[0][:5], "coarse": FEATURES[1][:5]}
    model = agree(pure(fitted(case)), arrays, TOLERANCE, batches=(1, 2, 5))
    kinds = [node.op_type for node in model.graph.node]
    nodes, transposes = LARGEST.get(case, (250, 10))
    assert len(kinds) <= nodes
    assert kinds.count("Transpose") <= transposes
    assert "Einsum" not in kinds  # slow


@pytest.mark.parametrize("case", ["fastflow", "knn of several", "patchcore", "cflow"])
def test_equals_jax_with_padding(agree, fitted, case):
    valid = np.ones((3, *SIZE), bool)
    valid[1, 20:], valid[2, :, :14] = False, False
    arrays = {"fine": FEATURES[0][:3], "coarse": FEATURES[1][:3], "valid": valid}
    agree(pure(fitted(case)), arrays, TOLERANCE)


def test_features_are_rounded_as_in_training(exported, fitted):
    """Features that are equal in float16 have equal scores."""
    scorer = pure(fitted("gaussian"))

    def function(fine, coarse):
        return {"score": scorer(fine.astype("float16"), coarse.astype("float16"))["score"]}

    exact = {n: m[:2].astype(np.float32) for n, m in zip(("fine", "coarse"), FEATURES, strict=True)}
    _, run = exported(function, exact)
    near = jax.tree.map(lambda m: m * np.float32(1 + 1e-5), exact)
    np.testing.assert_array_equal(run(**near)["score"], run(**exact)["score"])


def random_like(spec):
    """An array of a shape and type; integers count along each row."""
    if np.issubdtype(spec.dtype, np.integer):
        return np.broadcast_to(np.arange(spec.shape[-1], dtype=spec.dtype), spec.shape)
    return (0.1 * RNG.normal(size=spec.shape)).astype(spec.dtype)


def test_the_default_detector_is_a_small_graph(agree):
    """From pixels to scores; few nodes move axes."""
    config = default()
    config.weights, config.image_size = "random", (64, 64)
    config = fill(config)
    backbone = create_backbone(config.backbone, weights="random", layers=tuple(config.layers))
    features = jax.eval_shape(backbone, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    variables = jax.eval_shape(flow_model(config).init, jax.random.key(0), features)
    variables = jax.tree.map(random_like, variables)
    banks = {
        f"{kind}_{i}": RNG.normal(size=(50, m.shape[-1])).astype(np.float16)
        for i, m in enumerate(features)
        for kind in ("features", "latents")
    }
    calibration = identity(np.ones(3 * len(features), np.float32))
    scorer = FastFlowScorer(config, variables | {"bank": banks}, calibration)
    function = pure_function(config, backbone.module, scorer.function)
    state = state_of(backbone, scorer)
    images = RNG.integers(0, 256, (2, 64, 64, 3), np.uint8)
    tolerance = {"score": 1e-4, "anomaly_map": 1e-3, "means": 1e-4}
    model = agree(lambda images: function(state, (images, None)), {"images": images}, tolerance)
    kinds = [node.op_type for node in model.graph.node]
    assert len(kinds) <= 900
    assert kinds.count("Transpose") <= 9
    assert kinds.count("Conv") == 45 + 4 * (1 + 2 * 4)  # backbone, whitening, couplings
    assert not {"Loop", "Scan", "Einsum"} & set(kinds)
