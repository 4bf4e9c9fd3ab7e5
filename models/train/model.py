"""The reasoner in PyTorch, of Qwen3's architecture: grouped queries, norms on queries and keys, SwiGLU."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes, by GGUF's names."""

    n_vocab: int = 1024
    n_layer: int = 10
    n_embd: int = 384
    n_head: int = 8
    n_head_kv: int = 4
    n_embd_head: int = 64
    n_ff: int = 1024
    n_ctx: int = 4096
    rope_base: float = 50000.0
    norm_eps: float = 1e-6

    def as_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return asdict(self)


# q [n, n_head, d], k and v [n, n_head_kv, d], and what says where documents are -> [n, n_head, d]
Attention = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def rope_tables(cfg: Config, pos: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [n, 1, n_embd_head/2], of positions [n]."""
    half = cfg.n_embd_head // 2
    freq = cfg.rope_base ** (-torch.arange(half, device=pos.device, dtype=torch.float32) / half)
    angle = pos.float()[:, None] * freq
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, pairs (i, i + d/2) as in GPT-NeoX: x [n, heads, d]."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        d, q, kv = cfg.n_embd, cfg.n_head * cfg.n_embd_head, cfg.n_head_kv * cfg.n_embd_head
        self.cfg = cfg
        self.attn_norm = nn.RMSNorm(d, cfg.norm_eps)
        self.attn_q = nn.Linear(d, q, bias=False)
        self.attn_k = nn.Linear(d, kv, bias=False)
        self.attn_v = nn.Linear(d, kv, bias=False)
        self.attn_q_norm = nn.RMSNorm(cfg.n_embd_head, cfg.norm_eps)
        self.attn_k_norm = nn.RMSNorm(cfg.n_embd_head, cfg.norm_eps)
        self.attn_output = nn.Linear(q, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, cfg.norm_eps)
        self.ffn_gate = nn.Linear(d, cfg.n_ff, bias=False)
        self.ffn_up = nn.Linear(d, cfg.n_ff, bias=False)
        self.ffn_down = nn.Linear(cfg.n_ff, d, bias=False)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values of x [n, n_embd]."""
        h = self.attn_norm(x)
        shape = (x.shape[0], -1, self.cfg.n_embd_head)
        q = rotate(self.attn_q_norm(self.attn_q(h).view(shape)), rope)
        k = rotate(self.attn_k_norm(self.attn_k(h).view(shape)), rope)
        return q, k, self.attn_v(h).view(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attention, where: Any = None) -> Tensor:
        """x [n, n_embd] -> the same shape."""
        out = attend(*self.qkv(x, rope), where)
        x = x + self.attn_output(out.flatten(1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Reasoner(nn.Module):
    """Tokens [n] at positions [n] -> hidden states; the embedding is also the output matrix."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embd = nn.Embedding(cfg.n_vocab, cfg.n_embd)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.output_norm = nn.RMSNorm(cfg.n_embd, cfg.norm_eps)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02
                if name.endswith(("attn_output.weight", "ffn_down.weight")):
                    std /= (2 * cfg.n_layer) ** 0.5
                nn.init.normal_(p, std=std)

    def forward(self, tokens: Tensor, pos: Tensor, attend: Attention, where: Any = None) -> Tensor:
        """Hidden states before the output matrix: [n, n_embd]."""
        x = self.token_embd(tokens)
        rope = rope_tables(self.cfg, pos)
        for layer in self.layers:
            x = layer(x, rope, attend, where)
        return self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, n_vocab]."""
        return F.linear(hidden, self.token_embd.weight)


def causal(q: Tensor, k: Tensor, v: Tensor, where: Any = None) -> Tensor:
    """Attention within one document; also on a CPU."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, where: list[int]) -> Tensor:
    """Attention within each of several documents laid end to end; where: their starts, and the end."""
    return torch.cat([causal(q[a:b], k[a:b], v[a:b]) for a, b in itertools.pairwise(where)])


def packed(q: Tensor, k: Tensor, v: Tensor, where: tuple[Tensor, int]) -> Tensor:
    """The same in one kernel, on CUDA; where: starts [n_docs + 1] int32, and the longest document."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = where
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    return varlen_attn(q, k, v, starts, starts, longest, longest, **CAUSAL)


def masked(q: Tensor, k: Tensor, v: Tensor, where: Any) -> Tensor:
    """The same by a block mask (block_mask), for a torch whose varlen_attn does not work."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return flex_attention(q, k, v, block_mask=where, enable_gqa=True)[0].transpose(0, 1)


def block_mask(document: Tensor) -> Any:
    """What `masked` takes, from the number of each token's document [n]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[i] == document[j])

    n = len(document)
    return create_block_mask(visible, None, None, n, n, device=str(document.device))


def _causal_arguments() -> dict[str, Any]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    old = "is_causal" in inspect.signature(varlen_attn).parameters  # torch 2.10
    return {"is_causal": True} if old else {"window_size": (-1, 0)}


CAUSAL = _causal_arguments()
