"""Random-weight models of a few thousand parameters, and the same models as a numpy forward pass.

The numpy pass keeps every key and value and attends, in each layer and KV head, only to the positions that
it is told: what an evicted cache must be equal to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

import reference as ref

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Shape:
    """arch llama turns adjacent pairs (NORM); qwen2, stablelm and others turn halves (NEOX)."""

    arch: str = "llama"
    n_layer: int = 3
    n_head: int = 4
    n_head_kv: int = 2
    d_head: int = 32
    n_vocab: int = 96
    n_ff: int = 64
    n_ctx: int = 32768
    n_rot: int | None = None  # None: the whole head
    freq_base: float = 10000.0
    yarn_factor: float = 0.0  # 0: no scaling
    n_ctx_orig: int = 0
    freq_factors: tuple[float, ...] = ()
    sharpness: float = 3.0  # size of the queries: how unevenly a token attends
    seed: int = 0

    @property
    def n_embd(self) -> int:
        return self.n_head * self.d_head

    @property
    def rope(self) -> ref.Rope:
        """The RoPE that llama.cpp gives this model: YaRN's magnitude comes from ggml, attn_factor stays 1."""
        yarn = self.yarn_factor > 0
        return ref.Rope(
            n_rot=self.d_head if self.n_rot is None else self.n_rot,
            neox=self.arch != "llama",
            freq_base=self.freq_base,
            freq_scale=1 / self.yarn_factor if yarn else 1.0,
            n_ctx_orig=self.n_ctx_orig or self.n_ctx,
            ext_factor=1.0 if yarn else 0.0,
            freq_factors=np.array(self.freq_factors, np.float32) if self.freq_factors else None,
        )


SMALL_SHAPE = Shape(n_layer=2, n_head=2, n_head_kv=2, d_head=16, n_vocab=32, n_ff=32)


def weights(shape: Shape) -> dict[str, NDArray[np.float32]]:
    """Tensors by GGUF name, [out, in], float32."""
    rng = np.random.default_rng(shape.seed)
    kv = shape.n_head_kv * shape.d_head

    def matrix(rows: int, cols: int, gain: float = 1.0) -> NDArray[np.float32]:
        return (gain * rng.normal(size=(rows, cols)) / np.sqrt(cols)).astype(np.float32)

    def vector(n: int, mean: float = 1.0) -> NDArray[np.float32]:
        return (mean + 0.1 * rng.normal(size=n)).astype(np.float32)

    out = {"token_embd.weight": rng.normal(size=(shape.n_vocab, shape.n_embd)).astype(np.float32)}
    for layer in range(shape.n_layer):
        block = {
            "attn_norm.weight": vector(shape.n_embd),
            "attn_q.weight": matrix(shape.n_embd, shape.n_embd, shape.sharpness),
            "attn_k.weight": matrix(kv, shape.n_embd),
            "attn_v.weight": matrix(kv, shape.n_embd),
            "attn_output.weight": matrix(shape.n_embd, shape.n_embd),
            "ffn_norm.weight": vector(shape.n_embd),
            "ffn_gate.weight": matrix(shape.n_ff, shape.n_embd),
            "ffn_up.weight": matrix(shape.n_ff, shape.n_embd),
            "ffn_down.weight": matrix(shape.n_embd, shape.n_ff),
        }
        if shape.arch == "qwen2":
            block |= {
                f"attn_{x}.bias": vector(n, 0.0) for x, n in (("q", shape.n_embd), ("k", kv), ("v", kv))
            }
        if shape.arch == "stablelm":
            block |= {"attn_norm.bias": vector(shape.n_embd, 0.0), "ffn_norm.bias": vector(shape.n_embd, 0.0)}
        out |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    out["output_norm.weight"] = vector(shape.n_embd)
    if shape.arch == "stablelm":
        out["output_norm.bias"] = vector(shape.n_embd, 0.0)
    out["output.weight"] = matrix(shape.n_vocab, shape.n_embd, 2.0)
    return out


def write_model(path: Path, shape: Shape) -> Path:
    """A GGUF file with float32 weights and no tokenizer."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(shape.n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_freq_base(shape.freq_base)
    writer.add_rope_dimension_count(shape.rope.n_rot)
    if shape.arch == "stablelm":
        writer.add_layer_norm_eps(1e-5)
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    if shape.yarn_factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(shape.yarn_factor)
        writer.add_rope_scaling_orig_ctx_len(shape.n_ctx_orig)
    for name, tensor in weights(shape).items():
        writer.add_tensor(name, tensor)
    if shape.freq_factors:
        writer.add_tensor("rope_freqs.weight", np.array(shape.freq_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rms_norm(x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


@dataclass
class Forward:
    """The llama and qwen2 architectures, token by token, for one sequence.

    `visible[layer][head]`: the positions that the next token may attend to; feed() adds the token itself.
    """

    shape: Shape
    keys: list[list[Floats]] = field(default_factory=list)  # [layer][position] -> [n_head_kv, d], after RoPE
    values: list[list[Floats]] = field(default_factory=list)
    visible: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.w = {name: tensor.astype(np.float64) for name, tensor in weights(self.shape).items()}
        self.keys = [[] for _ in range(self.shape.n_layer)]
        self.values = [[] for _ in range(self.shape.n_layer)]
        self.visible = [[[] for _ in range(self.shape.n_head_kv)] for _ in range(self.shape.n_layer)]

    def restrict(self, layer: int, head: int, positions: Iterable[int]) -> None:
        self.visible[layer][head] = [int(p) for p in positions]

    def feed(self, token: int) -> Floats:
        """Logits [n_vocab] after one more token."""
        s, w = self.shape, self.w
        x = w["token_embd.weight"][token]
        for layer in range(s.n_layer):
            b = f"blk.{layer}."
            x = x + w[b + "attn_output.weight"] @ self._attend(layer, rms_norm(x, w[b + "attn_norm.weight"]))
            y = rms_norm(x, w[b + "ffn_norm.weight"])
            gate = w[b + "ffn_gate.weight"] @ y
            x = x + w[b + "ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w[b + "ffn_up.weight"] @ y))
        return w["output.weight"] @ rms_norm(x, w["output_norm.weight"])

    def _project(self, layer: int, name: str, x: Floats) -> Floats:
        b = f"blk.{layer}.attn_{name}."
        out = self.w[b + "weight"] @ x
        if b + "bias" in self.w:
            out = out + self.w[b + "bias"]
        return out.reshape(-1, self.shape.d_head)

    def _attend(self, layer: int, x: Floats) -> Floats:
        s = self.shape
        pos = len(self.keys[layer])
        q = ref.rotate(self._project(layer, "q", x), np.full(s.n_head, pos), s.rope)
        self.keys[layer].append(ref.rotate(self._project(layer, "k", x), np.full(s.n_head_kv, pos), s.rope))
        self.values[layer].append(self._project(layer, "v", x))
        group = s.n_head // s.n_head_kv
        out = np.empty((s.n_head, s.d_head))
        for h in range(s.n_head_kv):
            seen = self.visible[layer][h]
            seen.append(pos)
            k = np.stack([self.keys[layer][p][h] for p in seen])
            v = np.stack([self.values[layer][p][h] for p in seen])
            mine = slice(h * group, (h + 1) * group)
            out[mine] = ref.softmax(q[mine] @ k.T / np.sqrt(s.d_head)) @ v
        return out.reshape(-1)
