"""Linear layers on the CPU, by oneDNN on weights that lie in its own blocks.

Knows nothing of adapters or of what the layers are for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Under it, the 10 us that a call of oneDNN takes of its own are more than its products save.
MIN_WEIGHTS = 2**18


# A weight in oneDNN's blocks has no strides. Inside an operator, torch.compile does not ask for them.
_library = torch.library.Library("mpg_linear", "DEF")
_library.define("packed(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor")


@torch.library.impl(_library, "packed", "CompositeExplicitAutograd")
def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("mpg_linear::packed", lib=_library)
def _packed_shape(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


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
        self.out_features = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.mpg_linear.packed(x, self.weight, self.bias, self.out_features)
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
