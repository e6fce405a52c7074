"""Golden values of anomalib's FastflowModel, the PyTorch reference's form behind another face.

    pip install anomalib==2.7.0 ... && python tests/goldens/make_anomalib.py

writes `anomalib.npz` next to this file: loss and anomaly map of one batch, and the losses of twenty
Adam steps. Features and parameters come from numpy's generator on both sides, so that the file
stays small; the frozen backbone is left out, whose features are held to timm elsewhere.
"""

import pathlib
import sys

import numpy as np

CHANNELS, SIDES, IMAGE, STEPS, BATCH = (8, 12, 16), (16, 8, 4), 64, 4, 6


def features(batch: int) -> list[np.ndarray]:
    """[B, h, w, C] for each scale."""
    rng = np.random.default_rng((7, batch))
    return [
        rng.normal(0.5, 2.0, (BATCH, side, side, c)).astype(np.float32)
        for side, c in zip(SIDES, CHANNELS, strict=True)
    ]


def parameters() -> list[dict]:
    """Parameters of each scale in Flax's layout."""
    rng = np.random.default_rng(3)

    def draw(*shape, scale):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    scales = []
    for side, c in zip(SIDES, CHANNELS, strict=True):
        passive, out = c - c // 2, 2 * (c // 2)
        steps = [
            {
                "conv_in_kernel": draw(3, 3, passive, passive, scale=0.2),
                "conv_in_bias": draw(passive, scale=0.2),
                "conv_out_kernel": draw(3, 3, passive, out, scale=0.2),
                "conv_out_bias": draw(out, scale=0.2),
                "scale": 9.98648 + draw(c, scale=0.3),
                "offset": draw(c, scale=0.3),
                "index": rng.permutation(c).astype(np.int32),
            }
            for _ in range(STEPS)
        ]
        norm = {
            "scale": 1 + draw(side, side, c, scale=0.2),
            "bias": draw(side, side, c, scale=0.2),
        }
        scales.append({"norm": norm, "steps": steps})
    return scales


def oracle() -> dict[str, np.ndarray]:
    """Results of anomalib."""
    import torch

    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    from torchvision_oracle import import_torchvision

    import_torchvision()
    from anomalib.models.image.fastflow.loss import FastflowLoss
    from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block

    class Given(torch.nn.Module):
        """Stands for the backbone: hands the features on."""

        def forward(self, maps):
            return maps

    model = FastflowModel((IMAGE, IMAGE), "resnet18", pre_trained=False)
    model.feature_extractor = Given()
    sizes = [(c, s, s) for c, s in zip(CHANNELS, SIDES, strict=True)]
    model.norms = torch.nn.ModuleList([torch.nn.LayerNorm(size) for size in sizes])
    model.fast_flow_blocks = torch.nn.ModuleList(
        [create_fast_flow_block(list(size), True, 1.0, STEPS) for size in sizes]
    )

    def chw(x):
        return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, -3)))

    with torch.no_grad():
        for given, norm, flow in zip(
            parameters(), model.norms, model.fast_flow_blocks, strict=True
        ):
            norm.weight.copy_(chw(given["norm"]["scale"]))
            norm.bias.copy_(chw(given["norm"]["bias"]))
            for values, block in zip(given["steps"], flow.module_list, strict=True):
                convs = [m for m in block.subnet if isinstance(m, torch.nn.Conv2d)]
                for name, conv in zip(("conv_in", "conv_out"), convs, strict=True):
                    kernel = values[f"{name}_kernel"].transpose(3, 2, 0, 1)
                    conv.weight.copy_(torch.tensor(np.ascontiguousarray(kernel)))
                    conv.bias.copy_(torch.tensor(values[f"{name}_bias"]))
                block.global_scale.copy_(torch.tensor(values["scale"]).view(1, -1, 1, 1))
                block.global_offset.copy_(torch.tensor(values["offset"]).view(1, -1, 1, 1))
                one_hot = np.eye(len(values["index"]), dtype=np.float32)[values["index"]]
                block.w_perm.copy_(torch.tensor(one_hot)[:, :, None, None])
                block.w_perm_inv.copy_(torch.tensor(one_hot.T.copy())[:, :, None, None])

    def given(batch):
        return [chw(x) for x in features(batch)]

    model.eval()
    with torch.no_grad():
        out = model(given(0))
    result = {"map": out.anomaly_map.numpy()[:, 0], "score": out.pred_score.numpy().ravel()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3, weight_decay=1e-5)
    model.train()
    losses = []
    for step in range(20):
        loss = FastflowLoss()(*model(given(step)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result | {"losses": np.array(losses, np.float32)}


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("anomalib.npz"), **oracle())
