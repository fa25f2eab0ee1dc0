"""What a denoiser costs: parameters and multiply-accumulates (MACs, which the papers call FLOPs).

Counted by running the model on the meta device, so DiC-H takes no memory.
"""

from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dic_repa.models.blocks import Block
from dic_repa.models.pretrained import Pretrained, forward_on_meta

WINOGRAD_GAIN = 2.25  # F(2x2, 3x3): 16 multiplications where the plain 3x3 convolution has 36


@dataclass(frozen=True)
class Cost:
    """Parameters; MACs of all convolutions, linears and matrix products for one image at one step; both with Winograd,
    None for a model without convolutions that have it."""

    parameters: int
    macs: int
    winograd_macs: int | None


def measure_cost(model: Pretrained, height: int, width: int | None = None) -> Cost:
    """The cost of `model` for one image of `height` x `width` (in latent pixels). The model stays as it is.

    Attention counts with its two products, as in DiT's and U-ViT's papers; norms, activations and softmax do not count.
    "With Winograd" divides by 2.25 the MACs of the 3x3 convolutions inside DiC's blocks, as the paper does, and adds
    two operations for each output of a GroupNorm, which the paper's figures (57.2, 228.7, 97.2, 388.4 GMACs) contain.
    """
    winograd = norm = 0

    def count(module, _inputs, output):
        nonlocal winograd, norm
        if isinstance(module, nn.GroupNorm):
            norm += 2 * output.numel()
        else:
            winograd += output.numel() // module.out_channels * module.weight.numel()

    counted: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    for block in (module for module in model.modules() if isinstance(module, Block)):
        counted += [conv for conv in block.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
    hooks = [module.register_forward_hook(count) for module in counted]
    try:
        with FlopCounterMode(display=False) as counter:
            forward_on_meta(model, height, width or height)
    finally:
        for hook in hooks:
            hook.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = counter.get_total_flops() // 2
    return Cost(parameters, macs, macs - winograd + round(winograd / WINOGRAD_GAIN) + norm if winograd else None)
