"""Figures that others published, each with its source, to stand beside those of a run.

All are AUROCs between 0 and 1. They are as published: most were chosen as the best epoch on test
images, and systems differ in how masks are resized and in the backbone's exact weights.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Published:
    """One column of a table."""

    system: str
    metric: str  # "image_auroc" or "pixel_auroc"
    source: str
    figures: Mapping[str, float]  # by category
    mean: float
    categories: int  # that the mean is over


def published(dataset: str, backbone: str) -> tuple[Published, ...]:
    """What was published on a data set with a backbone, the paper first; mostly nothing."""
    if dataset == "cifar10":
        return (_CIFAR10,)
    return _MVTEC_AD.get(backbone, ()) if dataset == "mvtec_ad" else ()


_PAPER = "Yu et al. 2021, arXiv 2111.07677"
_GATHIERRY = "README of gathierry/FastFlow, PyTorch, masks floored"
_ANOMALIB = "README of anomalib, seed 0, early stopping"

_CATEGORIES = (
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
)


def _column(system, metric, source, mean, figures=()):
    if not isinstance(figures, Mapping):
        figures = dict(zip(_CATEGORIES, figures, strict=bool(figures)))
    return Published(system, f"{metric}_auroc", source, figures, mean, len(_CATEGORIES))


def _gathierry(last: tuple, last_mean: float, best: tuple, best_mean: float):
    return (
        _column("gathierry last", "pixel", f"{_GATHIERRY}, epoch 500", last_mean, last),
        _column(
            "gathierry best", "pixel", f"{_GATHIERRY}, best epoch on test images", best_mean, best
        ),
    )


def _anomalib(image: float, pixel: float, **images: float):
    return (
        _column("anomalib", "image", _ANOMALIB, image, images),
        _column("anomalib", "pixel", _ANOMALIB, pixel),
    )


# fmt: off
_MVTEC_AD = {
    "resnet18": (
        _column("paper", "image", f"{_PAPER}, as quoted by lelexx/fastflow_paddle", 0.979),
        _column("paper", "pixel", f"{_PAPER}, as quoted by lelexx/fastflow_paddle", 0.972),
        *_gathierry(
            (.975, .942, .979, .986, .973, .922, .991, .950, .955, .952, .916, .967, .970, .894,
             .969), .956,
            (.979, .962, .985, .986, .985, .963, .996, .966, .968, .957, .951, .978, .975, .954,
             .979), .972,
        ),
        *_anomalib(.907, .968, screw=.521),
    ),
    "wide_resnet50_2": (
        _column("paper", "pixel", f"{_PAPER}, as quoted by gathierry/FastFlow", 0.981),
        *_gathierry(
            (.987, .950, .987, .988, .991, .957, .995, .968, .968, .969, .955, .985, .956, .948,
             .980), .972,
            (.989, .978, .989, .989, .993, .984, .996, .986, .977, .987, .971, .986, .975, .964,
             .987), .983,
        ),
        *_anomalib(.963, .979, screw=.839),
    ),
    "deit_base_distilled_patch16_384": (
        _column("paper", "pixel", f"{_PAPER}, as quoted by gathierry/FastFlow", 0.981),
        *_gathierry(
            (.931, .976, .982, .991, .965, .982, .991, .980, .977, .990, .966, .983, .959, .960,
             .966), .973,
            (.959, .979, .988, .994, .980, .990, .994, .988, .989, .990, .966, .988, .970, .963,
             .974), .981,
        ),
        *_anomalib(.925, .975),
    ),
    "cait_m48_448": (
        _column(
            "paper", "image", f"{_PAPER}, as quoted by RistoranteRist/FastFlow", .994,
            (1.0, 1.0, 1.0, 1.0, .997, 1.0, 1.0, 1.0, .994, .978, 1.0, .944, .998, 1.0, .995),
        ),
        _column(
            "paper", "pixel", f"{_PAPER}, as quoted by RistoranteRist/FastFlow", .985,
            (.977, .984, .991, .994, .983, .991, .995, .985, .992, .994, .963, .989, .973, .970,
             .987),
        ),
        *_gathierry(
            (.926, .975, .987, .981, .968, .981, .994, .977, .984, .991, .946, .989, .967, .950,
             .972), .973,
            (.976, .981, .990, .993, .970, .992, .996, .984, .990, .993, .972, .992, .969, .959,
             .984), .983,
        ),
        *_anomalib(.944, .980, cable=.839),
    ),
}
# fmt: on

_CIFAR10 = Published(
    "paper",
    "image_auroc",
    f"{_PAPER}, as quoted by the paperswithcode listing, which names no backbone",
    {},
    0.667,
    10,
)
