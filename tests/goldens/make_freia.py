"""Golden values of FrEIA's AllInOneBlock in the form that FastFlow was published with.

    pip install torch freia==0.2 && python tests/goldens/make_freia.py

writes `freia.npz` next to this file. `freia` 0.2 has the old soft clamp, clamp * tanh(0.1 a).
"""

import pathlib

import numpy as np

CASES = {"odd": (5, 3, 4, 3, 1.0), "even": (8, 4, 4, 1, 0.5)}  # C, H, W, kernel, hidden ratio


def oracle(channels, height, width, kernel, ratio):
    """Parameters (in Flax's layout), input, output, log-det, inverse and gradients of one step."""
    import torch
    from FrEIA.modules import AllInOneBlock

    torch.manual_seed(0)

    def subnet(c_in, c_out):
        hidden = int(c_in * ratio)
        return torch.nn.Sequential(
            torch.nn.Conv2d(c_in, hidden, kernel, padding="same"),
            torch.nn.ReLU(),
            torch.nn.Conv2d(hidden, c_out, kernel, padding="same"),
        )

    block = AllInOneBlock(
        [(channels, height, width)],
        subnet_constructor=subnet,
        affine_clamping=2.0,
        permute_soft=False,
    )
    with torch.no_grad():  # away from the start, where a scale of 1 hides mistakes
        for p in (block.global_scale, block.global_offset, *block.subnet.parameters()):
            p.add_(0.5 * torch.randn_like(p))
    x = torch.randn(2, channels, height, width, requires_grad=True)
    (y,), log_det = block([x])
    (back,), _ = block([y.detach()], rev=True)
    names = {
        "conv_in_kernel": block.subnet[0].weight,
        "conv_in_bias": block.subnet[0].bias,
        "conv_out_kernel": block.subnet[2].weight,
        "conv_out_bias": block.subnet[2].bias,
        "scale": block.global_scale,
        "offset": block.global_offset,
    }
    (0.5 * (y**2).sum() - log_det.sum()).backward()

    def flax(t):
        t = t.detach().numpy()
        if t.ndim == 4 and t.shape[0] == 1:  # global scale and offset, [1, C, 1, 1]
            return t.ravel()
        return t.transpose(2, 3, 1, 0) if t.ndim == 4 else t

    def nhwc(t):
        return t.detach().numpy().transpose(0, 2, 3, 1)

    out = {f"param_{k}": flax(v) for k, v in names.items()}
    out |= {f"grad_{k}": flax(v.grad) for k, v in names.items()}
    out |= {
        "index": block.w_perm[:, :, 0, 0].argmax(1).numpy(),
        "x": nhwc(x),
        "y": nhwc(y),
        "back": nhwc(back),
        "log_det": log_det.detach().numpy(),
        "grad_x": nhwc(x.grad),
    }
    return out


if __name__ == "__main__":
    values = {
        f"{case}/{name}": value
        for case, arguments in CASES.items()
        for name, value in oracle(*arguments).items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("freia.npz"), **values)
