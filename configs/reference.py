"""FastFlow as published (arXiv 2111.07677), in the form of its PyTorch reference.

    python -m fastflow_jax.main --config=configs/reference.py:bottle
    python -m fastflow_jax.main --config=configs/reference.py --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/reference.py \
        --config.backbone=deit_base_distilled_patch16_384     # or cait_m48_448

The reference's coupling clamp of 2, summed loss, Adam at 1e-3 with L2 decay for 500 epochs, a map
of probabilities without the log-determinant, averaged over the scales, and its maximum as the image
score. All training images are used; nothing is held out. These depend on the backbone:

    backbone                         input  features          norm  steps  kernels  ratio  trainable
    resnet18                           256  layer1 to layer3  layer     8  3          1    5,574,912
    wide_resnet50_2                    256  layer1 to layer3  layer     8  3 and 1    1   45,007,872
    deit_base_distilled_patch16_384    384  block 7           none     20  3 and 1  .16    7,074,500
    cait_m48_448                       448  block 40          none     20  3 and 1  .16    7,074,500

Blocks are counted from 0, and their tokens pass through the transformer's own last norm. The layer
norm is per image, with a trainable scale and offset for every location and channel. With
`--config.flow.hidden_ratio=0.33334` the transformers' flows have 128 hidden channels and 14,794,240
trainable numbers, about as many as in the paper.

Needs: MVTec AD, downloaded manually (docs/data.md); weights, `pip install -e '.[hub]'`.
Time and figures: not measured. The form is tested for parity with anomalib and FrEIA.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Returns the published form on MVTec AD: one category, several with commas, or all."""
    c = default()
    c.data.name = "mvtec_ad"
    c.data.category = category
    c.data.holdout = 0.0
    c.published = True
    c.backbone = "resnet18"
    c.length_power = 1.0
    c.feature_dtype = "float32"
    c.flow.affine = "softplus"
    c.flow.zero_init = False
    c.flow.out_kernel = 0
    c.train.epochs = 500
    c.train.batch_size = 32
    c.train.window = 0
    c.train.drop_last = True
    c.train.loss = "sum"
    c.train.learning_rate = 1e-3
    c.train.beta2 = 0.999
    c.train.weight_decay = 1e-5
    c.train.clip = 0.0
    c.train.schedule = "constant"
    c.train.warmup = 0.0
    c.map.form = "probability"
    c.map.log_det = 0.0
    c.map.bank = 0
    c.map.standardise = False
    c.map.compress = False
    c.map.border, c.map.coarse_weight = 1, 1.0
    c.map.sigma = 0.0
    c.score.form = "top_k"
    c.score.top_k = 0.0
    c.checkpoint_every = 10
    return c
