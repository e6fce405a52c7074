"""AeBAD: blades of aero engines, with shifts between training and test images.

Zhang et al., "Industrial Anomaly Detection with Domain Shift: A Real-world Dataset and Masked
Multi-scale Reconstruction", arXiv:2304.02216. The categories `same`, `background`, `illumination`
and `view` of AeBAD-S are test images of one domain, all with the same training images; the kinds of
defects are ablation, breakdown, fracture and groove. The categories `video1` to `video3` of AeBAD-V
are frames of videos, without masks. The layout is that of the authors' reader (repository MMR).
The numbers of images are not checked, and this module was never run on the official files.
"""

from pathlib import Path

from fastflow_jax.data.dataset import GOOD, DataConfig, Dataset
from fastflow_jax.data.layout import (
    Item,
    Layout,
    Splits,
    list_images,
    list_subfolders,
    read_layout,
    to_records,
)
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.errors import InputError

DOMAINS = ("same", "background", "illumination", "view")
VIDEOS = ("video1", "video2", "video3")
CATEGORIES = DOMAINS + VIDEOS


class Aebad(prepared.Builder):
    """Builder of one domain or video; `<manual_dir>` has AeBAD_S and AeBAD_V."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://github.com/zhangzilongc/MMR"
    CITATION = "arXiv:2304.02216"
    LICENCE = "CC BY 4.0"
    IMAGES = "not checked"
    ARCHIVES = ("AeBAD.zip",)
    PLACES, CONTAINS = (".",), "AeBAD_S"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download the set ({LICENCE}) from the link in {HOMEPAGE}, and put the directories "
        "AeBAD_S and AeBAD_V there; or set data.root to the directory that has them."
    )

    @property
    def has_masks(self) -> bool:
        """True for the domains of AeBAD-S."""
        return self.category in DOMAINS

    def splits(self, folder: Path) -> Splits:
        """Returns the training images of the set and the test images of the domain or video."""
        if self.category in VIDEOS:
            return _video(folder / "AeBAD_V", self.category)
        layout = Layout(mask_suffix="", calibration=None, is_complete=True)
        splits = read_layout(folder / "AeBAD_S", layout)
        # Names are <defect>/<domain>/<file>.
        test = [record for record in splits["test"] if record.name.split("/")[1] == self.category]
        if not test:
            raise InputError(
                f"{folder / 'AeBAD_S/test'} has no images of {self.category}. Unpack it again."
            )
        return splits | {"test": test}


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the domain or video `config.category`; see `manual.open_category`."""
    return manual.open_category(Aebad, config)


def _video(folder: Path, video: str) -> Splits:
    if not (folder / "test" / video).is_dir():
        raise InputError(f"{folder / 'test'} has no directory {video}. Unpack AeBAD_V there.")
    train = folder / "train/good"
    test = list_subfolders(folder / "test" / video)
    return {
        "train": to_records(
            Item(path, f"{GOOD}/{path.relative_to(train).as_posix()}")
            for path in list_images(train)
        ),
        "test": to_records(
            Item(path, f"{name}/{path.name}", name) for name in test for path in test[name]
        ),
    }
