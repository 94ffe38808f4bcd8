"""The architectures that mpg runs or refuses: one list for the tests and for docs/architectures.md.

Knows tiny configurations, what adapters usually target, and why a model is refused; nothing of how either is tested.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

VOCAB = 61
TOKENS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(
    **TOKENS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
GPT_SIZES = dict(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64)
OPT_SIZES = dict(
    **TOKENS,
    hidden_size=32,
    word_embed_proj_dim=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
LATENT_SIZES = {name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
VISION_SIZES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WINDOW = dict(sliding_window=5)  # the texts of the tests are longer
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED_EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
TWO_KINDS = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)


@dataclass(frozen=True)
class Architecture:
    """A decoder that runs: tested at every position against plain full forwards.

    special: what the tiny configuration sets beside its sizes
    targets: the linear layers that the adapters of the tests sit on
    """

    name: str
    model_type: str
    special: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = EVERY_LINEAR
    note: str = ""
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)

    @property
    def settings(self) -> dict[str, Any]:
        return copy.deepcopy({**self.sizes, **self.special})  # transformers 5.17 writes into what it is given


@dataclass(frozen=True)
class Refused(Architecture):
    """A model that is refused by name.

    reason:     what the error says
    by_running: whether only the check at load notices, so that it needs weights
    """

    reason: str = ""
    by_running: bool = False


STATE = "layers keep a state that cannot be rolled back when drafted tokens are rejected"
NO_INTERFACE = "it does not declare that its attention goes through transformers' attention interface"
ALIBI = "ALiBi position biases do not pass through the attention interface"

ARCHITECTURES = (
    Architecture("Llama", "llama"),
    Architecture("Qwen2", "qwen2"),
    Architecture("Qwen3", "qwen3"),
    Architecture("Qwen3-MoE", "qwen3_moe", EXPERTS, ATTENTION),
    Architecture("Mistral", "mistral", WINDOW),
    Architecture("Mixtral", "mixtral", LOCAL_EXPERTS, ATTENTION),
    Architecture("Gemma", "gemma"),
    Architecture(
        "Gemma 2",
        "gemma2",
        dict(WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
        note="the reference is eager attention: transformers 5.17 drops the soft cap in its default one",
    ),
    Architecture("Gemma 3", "gemma3_text", dict(WINDOW, **TWO_KINDS)),
    Architecture(
        "Gemma 3 with images",
        "gemma3",
        sizes=dict(
            text_config=dict(SIZES, **WINDOW, **TWO_KINDS),
            vision_config=VISION_SIZES,
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=58,
            eoi_token_index=59,
        ),
        note="text only, sizes and window as for Gemma 3",
    ),
    Architecture(
        "Gemma 3n",
        "gemma3n_text",
        dict(
            WINDOW,
            **TWO_KINDS,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            intermediate_size=[48] * 4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        note="layers that share keys and values; its forward is not captured under transformers 5.17",
    ),
    Architecture(
        "Gemma 4",
        "gemma4_text",
        dict(
            WINDOW,
            **TWO_KINDS,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            global_head_dim=16,
        ),
        note="heads of two sizes, layers that share keys and values",
    ),
    Architecture("Phi-3", "phi3", WINDOW, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    Architecture("OLMo 2", "olmo2"),
    Architecture("Cohere 2", "cohere2", dict(WINDOW, logit_scale=1.0)),
    Architecture(
        "GPT-NeoX",
        "gpt_neox",
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        sizes=LATENT_SIZES,
    ),
    Architecture("GPT-2", "gpt2", targets=("c_attn", "c_proj", "c_fc"), sizes=GPT_SIZES, note="learned positions"),
    Architecture("OPT", "opt", targets=("q_proj", "out_proj", "fc1", "fc2"), sizes=OPT_SIZES, note="learned positions"),
    Architecture(
        "DeepSeek-V3",
        "deepseek_v3",
        dict(
            ROUTED_EXPERTS,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            num_key_value_heads=4,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        sizes=LATENT_SIZES,
        note="latent attention: keys of 12 and values of 8 dimensions a head",
    ),
    Architecture("GPT-OSS", "gpt_oss", dict(WINDOW, **LOCAL_EXPERTS), ATTENTION, note="attention sinks"),
    Architecture(
        "Llama 4",
        "llama4_text",
        dict(
            attention_chunk_size=4,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            no_rope_layers=[1, 0],
            attn_temperature_tuning=False,
        ),
        ATTENTION,
        note="chunked attention; with its temperature tuning it is refused, below",
    ),
    Architecture("Granite", "granite", dict(attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0)),
    Architecture("SmolLM3", "smollm3", dict(no_rope_layers=[1, 0])),
    Architecture("GLM-4", "glm4", targets=(*ATTENTION, "gate_up_proj", "down_proj")),
)

LINEAR_ATTENTION = dict(linear_num_value_heads=4, linear_num_key_heads=2)
LONG_ROPE = dict(
    rope_type="longrope",
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position_embeddings=32,
    rope_theta=1e4,
)
STALE = "changes with the longest row, so cached keys would go stale"

REFUSED = (
    Refused("BLOOM", "bloom", sizes=dict(TOKENS, hidden_size=32, n_head=4, n_layer=1), reason=ALIBI),
    Refused("MPT", "mpt", sizes=dict(TOKENS, d_model=32, n_heads=4, n_layers=1), reason=ALIBI),
    Refused("Falcon with ALiBi", "falcon", dict(alibi=True), sizes=OPT_SIZES, reason=ALIBI),
    Refused("Falcon", "falcon", sizes=OPT_SIZES, reason=NO_INTERFACE),
    Refused("GPT-J", "gptj", dict(rotary_dim=4), sizes=GPT_SIZES, reason=NO_INTERFACE),
    Refused("CodeGen", "codegen", dict(rotary_dim=4), sizes=GPT_SIZES, reason=NO_INTERFACE),
    Refused(
        "GPT-Neo",
        "gpt_neo",
        dict(attention_types=[[["global", "local"], 1]], window_size=5),
        sizes=dict(TOKENS, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64),
        reason=NO_INTERFACE,
    ),
    Refused(
        "XGLM",
        "xglm",
        sizes=dict(TOKENS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64),
        reason=NO_INTERFACE,
    ),
    Refused("BART's decoder", "bart", sizes=dict(TOKENS, d_model=32), reason=NO_INTERFACE),
    Refused("StableLM", "stablelm", reason=NO_INTERFACE),
    Refused(
        "Llama with dynamic RoPE",
        "llama",
        dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
        reason=f"RoPE type 'dynamic' {STALE}",
    ),
    Refused("Phi-3 with long RoPE", "phi3", dict(rope_parameters=LONG_ROPE), reason=f"RoPE type 'longrope' {STALE}"),
    Refused(
        "Llama 4 as published",
        "llama4_text",
        dict(num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1, 0]),
        reason="attn_temperature_tuning takes the positions of all rows from one length",
    ),
    Refused("Mamba", "mamba", dict(state_size=8), reason=STATE),
    Refused(
        "Mamba 2",
        "mamba2",
        dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
        sizes=dict(TOKENS, hidden_size=32, num_hidden_layers=2),
        reason=STATE,
    ),
    Refused("RWKV", "rwkv", dict(attention_hidden_size=32), reason=STATE),
    Refused(
        "RecurrentGemma", "recurrent_gemma", dict(lru_width=32, block_types=["recurrent", "attention"]), reason=STATE
    ),
    Refused("Qwen3-Next", "qwen3_next", dict(EXPERTS, **LINEAR_ATTENTION), reason=STATE),
    Refused("Jamba", "jamba", dict(num_experts=2), reason=STATE),
    Refused("Bamba", "bamba", dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8), reason=STATE),
    Refused("Falcon-H1", "falcon_h1", reason=STATE),
    Refused("LFM2", "lfm2", dict(layer_types=["conv", "full_attention"]), reason=STATE),
    Refused(
        "BERT's decoder",
        "bert",
        sizes=LATENT_SIZES,
        reason="its forward raises AssertionError: the model attends without its cache",
        by_running=True,
    ),
    Refused("Doge", "doge", reason="its forward raises RuntimeError", by_running=True),
)
