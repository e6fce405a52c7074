"""Torch side of the speed benchmarks, a process that `peer.Peer` starts and sends requests to.

A request is a line of JSON on stdin, `[method of Session, arguments]`; the answer is a line on
stdout. The models are "anomalib", its `FastflowModel`, and "freia", the same with FrEIA's own
blocks. Both have the same weights, which `build` writes for our side.
"""

import copy
import functools
import json
import os
import pathlib
import sys
import time

import torch
import torchvision_operators  # noqa: F401
from safetensors.torch import load_file, save_file

# isort: split
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, subnet_conv_func
from anomalib_fastflow import build_model, make_optimizer, train_step
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from outcome import peak_memory


def freia_model(model: FastflowModel, kernels: list[int], ratio: float) -> FastflowModel:
    """Copy of the model with FrEIA's blocks instead of anomalib's copies of them."""
    freia = copy.deepcopy(model)
    freia.fast_flow_blocks = torch.nn.ModuleList()
    for block in model.fast_flow_blocks:
        flow = SequenceINN(*block.shapes[0])
        for i in range(len(block.module_list)):
            flow.append(
                AllInOneBlock,
                subnet_constructor=subnet_conv_func(kernels[i % len(kernels)], ratio),
                affine_clamping=2.0,
                permute_soft=False,
            )
        flow.load_state_dict(block.state_dict())
        freia.fast_flow_blocks.append(flow)
    return freia


def anomalib_model(backbone, side, steps, kernels, ratio) -> FastflowModel:
    """Model of anomalib with random weights; EfficientNet-Lite0 has those of its package."""
    kinds = {"conv3x3_only": kernels == [3], "hidden_ratio": ratio, "flow_steps": steps}
    if backbone == "tf_efficientnet_lite0":
        return build_model(side, **kinds)
    return FastflowModel((side, side), backbone, pre_trained=False, **kinds)


def backbone_maps(model: FastflowModel, images: torch.Tensor) -> list[torch.Tensor]:
    """Feature maps of the frozen backbone; transformers end with their own norm."""
    if hasattr(model, "norms"):
        return model.feature_extractor(images)
    return model._get_vit_features(images)


def latents(model: FastflowModel, maps: list[torch.Tensor]) -> tuple[list, list]:
    """Latents and log-determinants of norms and flows, as in the model's `forward`."""
    if hasattr(model, "norms"):
        maps = [norm(m) for norm, m in zip(model.norms, maps, strict=True)]
    pairs = [flow(m) for flow, m in zip(model.fast_flow_blocks, maps, strict=True)]
    return tuple(map(list, zip(*pairs, strict=True)))


class Session:
    """Models of one backbone and one batch of images."""

    def __init__(self):
        torch.set_num_threads(os.cpu_count())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def build(self, backbone, side, steps, kernels, ratio, folder) -> dict:
        """Builds the models, writes their weights to a directory and reads the images there."""
        torch.manual_seed(0)
        model = anomalib_model(backbone, side, steps, kernels, ratio)
        parts = {"backbone": model.feature_extractor, "flow": model}
        for name, part in parts.items():
            state = {
                k: v.contiguous()
                for k, v in part.state_dict().items()
                if name == "backbone" or not k.startswith("feature_extractor.")
            }
            save_file(state, pathlib.Path(folder, f"{name}.safetensors"))
        self.models = {"anomalib": model, "freia": freia_model(model, kernels, ratio)}
        self.optimizers = {}
        for name, each in self.models.items():
            each.to(self.device)
            self.optimizers[name] = make_optimizer(each)
        images = load_file(pathlib.Path(folder, "images.safetensors"))["images"]
        self.host_images = images.permute(0, 3, 1, 2).contiguous()
        self.images = self.host_images.to(self.device)
        model.feature_extractor.eval()
        with torch.no_grad():
            self.maps = [m.clone() for m in backbone_maps(model, self.images)]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"trainable": trainable, "torch": torch.__version__, "device": self.device}

    def _autocast(self, dtype):
        enabled = dtype != "float32"
        return torch.autocast(self.device, getattr(torch, dtype), enabled=enabled)

    def _wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def train_seconds(self, model, cached, dtype) -> dict:
        """Loss and seconds of one training step."""
        net = self.models[model].train()
        forward, batch = net, self.images
        if cached:
            forward, batch = functools.partial(latents, net), self.maps
        self._wait()
        start = time.perf_counter()
        with self._autocast(dtype):
            loss = train_step(forward, self.optimizers[model], FastflowLoss(), batch)
        self._wait()
        return {"loss": loss, "seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def score_seconds(self, part, dtype, repeats) -> dict:
        """Mean score and seconds of `repeats` calls of a part of anomalib's model, or of "all".

        "all" starts from images in host memory and ends with maps there.
        """
        net = self.models["anomalib"].eval()
        with self._autocast(dtype):
            z, _ = latents(net, self.maps) if part == "map" else (None, None)

            def call():
                if part == "backbone":
                    return backbone_maps(net, self.images)
                if part == "flow":
                    return latents(net, self.maps)
                if part == "map":
                    anomaly_map = net.anomaly_map_generator(z)
                    return torch.amax(anomaly_map, dim=(-2, -1))
                out = net(self.host_images.to(self.device))
                out.anomaly_map.cpu()
                return out.pred_score.cpu()

            self._wait()
            start = time.perf_counter()
            for _ in range(repeats):
                out = call()
                self._wait()
        seconds = (time.perf_counter() - start) / repeats
        score = float(out.float().mean()) if part in ("map", "all") else None
        return {"score": score, "seconds": seconds}

    def peak_memory(self, part, batch, **model) -> int:
        """Peak memory in bytes of this process after three training steps, or one scored batch."""
        net = anomalib_model(**model).to(self.device)
        images = torch.randn(batch, 3, model["side"], model["side"])
        if part == "training":
            optimizer = make_optimizer(net.train())
            for _ in range(3):
                train_step(net, optimizer, FastflowLoss(), images.to(self.device))
        else:
            with torch.inference_mode():
                net.eval()(images.to(self.device)).anomaly_map.cpu()
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()


def main() -> None:
    """Answers requests until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    session = Session()
    for line in sys.stdin:
        function, arguments = json.loads(line)
        print(json.dumps(getattr(session, function)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
