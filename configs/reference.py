"""FastFlow as published (arXiv 2111.07677), in the form of its PyTorch reference.

    python -m fastflow_jax.main --config=configs/reference.py:bottle
    python -m fastflow_jax.main --config=configs/reference.py --config.backbone=wide_resnet50_2

Layer norm of each image with trainable scale and offset, one flow a scale with couplings of old
clamp 2, the summed loss, Adam at 1e-3 with L2 decay for 500 epochs, a map of probabilities without
the log-determinant, averaged over the scales, and its maximum for a score. Every image trains the
flow: nothing is held out. Trainable numbers at 256x256: 5,574,912 (resnet18), 45,007,872
(wide_resnet50_2).
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """The published form on MVTec AD: one category, several, or all."""
    c = default()
    c.data.name = "mvtec_ad"
    c.data.category = category
    c.data.holdout = 0.0
    c.published = True
    c.backbone = "resnet18"
    c.length_power = 1.0
    c.flow.norm = "layer"
    c.flow.affine = "softplus"
    c.flow.zero_init = False
    c.train.epochs = 500
    c.train.batch_size = 32
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
    c.map.standardise = False
    c.score.form = "top_k"
    c.score.top_k = 0.0
    c.checkpoint_every = 10
    return c
