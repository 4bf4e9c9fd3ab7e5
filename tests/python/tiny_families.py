"""Small random models of other families than tiny_models.py's, for tests that need no forward pass of it.

Each kind: its architecture, GGUF keys and the shapes of a layer's tensors, [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

D, N_HEAD, HEAD, N_FF, N_VOCAB, N_CTX = 64, 4, 32, 48, 96, 2048
N_KV = 2 * HEAD
Shapes = dict[str, tuple[int, ...]]

FFN: Shapes = {"ffn_norm.weight": (D,), "ffn_gate.weight": (N_FF, D), "ffn_up.weight": (N_FF, D)}
FFN |= {"ffn_down.weight": (D, N_FF)}
QKV: Shapes = {"attn_norm.weight": (D,), "attn_q.weight": (N_HEAD * HEAD, D), "attn_k.weight": (N_KV, D)}
QKV |= {"attn_v.weight": (N_KV, D), "attn_output.weight": (D, N_HEAD * HEAD)}
POST: Shapes = {"post_attention_norm.weight": (D,), "post_ffw_norm.weight": (D,)}
QK_NORM: Shapes = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
NEXTN: Shapes = {"nextn.eh_proj.weight": (D, 2 * D), "nextn.enorm.weight": (D,), "nextn.hnorm.weight": (D,)}
LATENT, PE, NOPE = 64, 32, 32  # of an MLA head
MLA: Shapes = {
    "attn_norm.weight": (D,),
    "attn_q_a.weight": (48, D),
    "attn_q_a_norm.weight": (48,),
    "attn_q_b.weight": (N_HEAD * (NOPE + PE), 48),
    "attn_kv_a_mqa.weight": (LATENT + PE, D),
    "attn_kv_a_norm.weight": (LATENT,),
    "attn_k_b.weight": (N_HEAD, LATENT, NOPE),
    "attn_v_b.weight": (N_HEAD, HEAD, LATENT),
    "attn_output.weight": (D, N_HEAD * HEAD),
}
INDEXER: Shapes = {
    "indexer.k_norm.weight": (64,),
    "indexer.k_norm.bias": (64,),
    "indexer.proj.weight": (64, D),
    "indexer.attn_k.weight": (64, D),
    "indexer.attn_q_b.weight": (64 * 64, 48),
}
MOE: Shapes = {"ffn_gate_inp.weight": (2, D), "ffn_gate_exps.weight": (2, N_FF, D)}
MOE |= {"ffn_up_exps.weight": (2, N_FF, D), "ffn_down_exps.weight": (2, D, N_FF)}
MOE_BIAS: Shapes = {"ffn_gate_inp.bias": (2,), "ffn_gate_exps.bias": (2, N_FF)}
MOE_BIAS |= {"ffn_up_exps.bias": (2, N_FF), "ffn_down_exps.bias": (2, D)}
ENCODER: Shapes = {"attn_norm.weight": (D,), "attn_rel_b.weight": (8, 2), "attn_o.weight": (D, D)}
ENCODER |= {f"attn_{x}.weight": (D, D) for x in "qkv"}
ENCODER |= {"ffn_norm.weight": (D,), "ffn_up.weight": (N_FF, D), "ffn_down.weight": (D, N_FF)}
CONV: Shapes = {"attn_norm.weight": (D,), "shortconv.conv.weight": (D, 3)}
CONV |= {"shortconv.in_proj.weight": (3 * D, D), "shortconv.out_proj.weight": (D, D)}


def write_family(path: Path, kind: str) -> Path:
    """A GGUF file of KINDS[kind], float32."""
    arch, n_layer, keys, layer, globally = KINDS[kind]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(N_CTX)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(N_FF)
    writer.add_layer_norm_rms_eps(1e-5)
    keys = {"attention.head_count": N_HEAD, "attention.head_count_kv": 2, **keys}
    keys = {"attention.key_length": HEAD, "attention.value_length": HEAD, **keys}
    keys = {"rope.dimension_count": HEAD, "rope.freq_base": 10000.0, **keys}
    for name, value in keys.items():
        name = f"{arch}.{name}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    tensors: Shapes = {"token_embd.weight": (N_VOCAB, D), **globally}
    for il in range(n_layer):
        tensors |= {f"blk.{il}.{name}": shape for name, shape in layer(il).items()}
    rng = np.random.default_rng(len(kind))
    for name, shape in tensors.items():
        data = rng.normal(size=shape) / np.sqrt(shape[-1])
        if len(shape) == 1 and not name.endswith((".bias", "sinks.weight")):
            data = 1 + 0.1 * rng.normal(size=shape)
        if name == "token_embd.weight" or name.endswith("sinks.weight"):
            data = rng.normal(size=shape)
        if name.endswith("sinks.weight"):
            data += 6  # as strong as the strongest keys
        if name.endswith("attn_q.weight"):
            data *= 3  # uneven attention
        writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NORM: Shapes = {"output_norm.weight": (D,)}
WINDOW = {"attention.sliding_window": 24}
LFM2: dict[str, object] = {
    "attention.head_count": [N_HEAD, 0, N_HEAD],
    "attention.head_count_kv": [N_HEAD, 0, N_HEAD],
    "attention.key_length": 16,
    "attention.value_length": 16,
    "rope.dimension_count": 16,
    "shortconv.l_cache": 3,
}
LFM2_QKV: Shapes = {"attn_norm.weight": (D,), "attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
LFM2_QKV |= {f"attn_{x}.weight": (D, D) for x in ("q", "k", "v", "output")}
LATENT_KEYS = {
    "attention.head_count_kv": 1,
    "attention.key_length": LATENT + PE,
    "attention.value_length": LATENT,
    "attention.key_length_mla": NOPE + PE,
    "attention.value_length_mla": HEAD,
    "attention.q_lora_rank": 48,
    "attention.kv_lora_rank": LATENT,
    "rope.dimension_count": PE,
    "leading_dense_block_count": 3,
    "expert_feed_forward_length": N_FF,
    "expert_count": 2,
    "expert_used_count": 1,
    "expert_shared_count": 1,
}
INDEXER_KEYS = {
    "attention.indexer.head_count": 64,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 8,
    "expert_gating_func": 2,
}
SHARED: dict[str, object] = {
    "attention.sliding_window_pattern": [True, False] * 3,
    "attention.shared_kv_layers": 2,
    "embedding_length_per_layer_input": 0,
    "attention.key_length_swa": HEAD,
    "attention.value_length_swa": HEAD,
}

# architecture, layers, keys, tensors of layer il, other tensors
KINDS: dict[str, tuple[str, int, dict, Callable[[int], Shapes], Shapes]] = {
    "window, soft-cap": (
        "gemma2",
        4,
        WINDOW | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
        lambda _: QKV | POST | FFN,
        NORM,
    ),
    "window, sinks": (
        "gpt-oss",
        2,
        WINDOW | {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": N_FF},
        lambda _: (
            QKV
            | MOE
            | MOE_BIAS
            | {"post_attention_norm.weight": (D,), "attn_sinks.weight": (N_HEAD,)}
            | {"attn_q.bias": (N_HEAD * HEAD,), "attn_k.bias": (N_KV,), "attn_v.bias": (N_KV,)}
            | {"attn_output.bias": (D,)}
        ),
        NORM | {"output.weight": (N_VOCAB, D)},
    ),
    "window, shared layers": (
        "gemma4",
        6,
        WINDOW | SHARED,
        lambda _: QKV | QK_NORM | POST | FFN,
        NORM | {"rope_freqs.weight": (HEAD // 2,)},
    ),
    "window only": (
        "lfm2",
        3,
        LFM2 | WINDOW,
        lambda il: FFN | (CONV if il == 1 else LFM2_QKV),
        {"token_embd_norm.weight": (D,)},
    ),
    "hybrid": (
        "lfm2",
        3,
        LFM2,
        lambda il: FFN | (CONV if il == 1 else LFM2_QKV),
        {"token_embd_norm.weight": (D,)},
    ),
    "MLA": ("deepseek2", 3, LATENT_KEYS, lambda _: MLA | FFN, NORM | {"output.weight": (N_VOCAB, D)}),
    "indexer": (
        "deepseek32",
        3,
        LATENT_KEYS | INDEXER_KEYS,
        lambda _: MLA | INDEXER | FFN,
        NORM | {"output.weight": (N_VOCAB, D)},
    ),
    "M-RoPE": (
        "qwen2vl",
        2,
        {"attention.head_count": 2, "rope.dimension_sections": [4, 6, 4, 2]},
        lambda _: (
            QKV
            | FFN
            | {"attn_q.weight": (D, D), "attn_output.weight": (D, D)}
            | {"attn_q.bias": (D,), "attn_k.bias": (N_KV,), "attn_v.bias": (N_KV,)}
        ),
        NORM,
    ),
    "norm after RoPE": (
        "hunyuan-dense",
        2,
        {"attention.head_count": 2},
        lambda _: QKV | QK_NORM | FFN | {"attn_q.weight": (D, D), "attn_output.weight": (D, D)},
        NORM,
    ),
    "draft head": (
        "deepseek2",
        3,
        LATENT_KEYS | {"nextn_predict_layers": 1},
        lambda il: MLA | FFN | (NEXTN if il == 2 else {}),
        NORM | {"output.weight": (N_VOCAB, D)},
    ),
    "encoder": (
        "t5encoder",
        1,
        {"attention.head_count": 2, "attention.head_count_kv": 2, "attention.relative_buckets_count": 8},
        lambda _: {},
        {f"enc.blk.0.{name}": shape for name, shape in ENCODER.items()} | {"enc.output_norm.weight": (D,)},
    ),
    "diffusion": ("llada", 2, {}, lambda _: QKV | FFN, NORM),
}
