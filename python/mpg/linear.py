"""Linear layers on the CPU, by oneDNN on weights that lie in its own blocks.

Knows nothing of adapters or of what the layers are for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Under it, the 10 us that a call of oneDNN takes of its own are more than its products save.
MIN_WEIGHTS = 2**18


class PackedLinear(nn.Module):
    """What `linear` computes, by the two operators that torch.compile has for frozen weights.

    On the 1 to 40 rows of a decoding pass it takes a half to a third of the time of the BLAS that torch calls otherwise
    (MKL, on an AMD Zen 5 core).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replace the large float32 linear layers of `model` that are on the CPU; the layers themselves stay as they are.

    A weight that is in use elsewhere (tied to the embedding, or of a model that the caller keeps) is then there twice.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer.weight.numel() < MIN_WEIGHTS:
            continue
        if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
            model.set_submodule(name, PackedLinear(layer))
