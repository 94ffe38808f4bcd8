"""An adapter that cannot be stacked, merged into a model of its own. PEFT does it; here its work is checked.

Knows no role and nothing of the models beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from mpg.models.sources import refuse_damage

NUM_PROBED = 16  # tokens that the merged model is compared on


@torch.no_grad()
def merge_adapter(name: str, folder: str | Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapter of a folder or hub repository merged into its weights, which are changed.

    Warns, as PEFT does, of weights that the configuration asks for and the file lacks.

    Raises ValueError, naming the adapter, for files that cannot be read or do not fit the model or the configuration,
    for a kind that PEFT cannot merge, and where the merged model computes something else than PEFT unmerged.
    """
    embedding = model.get_input_embeddings().get_parameter("weight")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        saved = load_peft_weights(str(folder), device="cpu").keys()
    except Exception as error:
        refuse_damage(name, folder)
        wanted = f"an adapter that fits {type(model).__name__} and its vocabulary of {len(embedding)} tokens"
        raise ValueError(f"{name}: expected {wanted}, got {folder}: {_name(error)}") from error
    if other := sorted(saved - get_peft_model_state_dict(adapted, save_embedding_layers=True).keys()):
        raise ValueError(f"{name}: expected weights that its configuration describes, got {other[0]} too")
    # PEFT changes one of two layers that share a weight, and merges into both
    for layer in [layer for layer in model.modules() if layer._parameters.get("weight") is embedding][1:]:
        layer.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    probe = torch.arange(min(NUM_PROBED, len(embedding)), device=model.device)[None]
    expected = adapted(probe, use_cache=False).logits.float()
    try:
        merged = adapted.merge_and_unload()
    except Exception as error:  # of types that differ from kind to kind
        raise ValueError(f"{name}: expected an adapter that PEFT can merge, got {_name(error)}") from error
    tolerance = torch.finfo(model.dtype).eps ** 0.5  # far more than rounding makes, and less than an adapter does
    change = (merged(probe, use_cache=False).logits.float() - expected).norm() / expected.norm()
    if not change <= tolerance:
        wanted = f"a model that computes the same once PEFT has merged it, up to {tolerance:.1g}"
        raise ValueError(f"{name}: expected {wanted}, got logits that differ by {change:.1g} of their size")
    head = merged.get_output_embeddings()
    if torch.equal(head.weight, merged.get_input_embeddings().weight):  # they may share again
        head.weight = merged.get_input_embeddings().weight
    return merged


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
