"""Write a GGUF model with random weights in any shape, for tests and benchmarks.

The same arguments give the same bytes. Weights are scaled so that activations keep their size from layer to
layer; quantised types are drawn as random blocks, so that a model of many gigabytes is written as fast as the
disk takes it.

    python scripts/make_random_model.py tiny.gguf --layers 2 --heads 4 --kv-heads 2 --head-dim 32
    python scripts/make_random_model.py 8b.gguf --layers 32 --heads 32 --kv-heads 8 --head-dim 128 \
        --ff 14336 --vocab 128256 --type q4_0
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# rotate with NORM RoPE; NEOX; NEOX, with norms on Q and K; NEOX, a part of the head
ARCHS = ("llama", "qwen2", "qwen3", "stablelm")
TYPES = ("f32", "f16", "q8_0", "q4_0")
BLOCK = 32  # weights in a q8_0 or q4_0 block
CHUNK = 1 << 22  # weights drawn at a time


@dataclass(frozen=True)
class Shape:
    """What a model looks like. Sizes in elements.

    rope_dim: the rotated part of the head (None: all of it; a part of it needs arch stablelm).
    freq_factors: one divisor per pair, [rope_dim / 2] (arch llama). yarn_factor: 0 = no YaRN.
    tokenizer: a GGUF file to borrow the vocabulary and chat template from; None: no vocabulary.
    gain: factor on the query weights; above 1 attention is more peaked than random weights make it.
    """

    arch: str = "llama"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ff: int = 128
    vocab: int = 256
    type: str = "f16"
    seed: int = 0
    ctx: int = 131072
    rope_base: float = 10000.0
    rope_dim: int | None = None
    freq_factors: tuple[float, ...] = field(default=())
    yarn_factor: float = 0.0
    yarn_orig_ctx: int = 4096
    tokenizer: Path | None = None
    gain: float = 1.0
    same_layers: bool = False  # all layers hold the first one's weights: a large model in seconds

    @property
    def embd(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    def check(self) -> None:
        """Raise ValueError, one line, if no model can have this shape."""
        if self.arch not in ARCHS:
            raise ValueError(f"arch {self.arch!r} is not one of {', '.join(ARCHS)}")
        if self.type not in TYPES:
            raise ValueError(f"type {self.type!r} is not one of {', '.join(TYPES)}")
        for name in ("layers", "heads", "kv_heads", "head_dim", "ff", "vocab", "ctx"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        rope_dim = self.rope_dim or self.head_dim
        if rope_dim % 2 or rope_dim > self.head_dim:
            raise ValueError(f"rope_dim {rope_dim} is odd or larger than head_dim {self.head_dim}")
        if rope_dim != self.head_dim and self.arch != "stablelm":
            raise ValueError(f"arch {self.arch} rotates whole heads; stablelm rotates a part")
        if self.freq_factors and self.arch != "llama":
            raise ValueError("freq_factors need arch llama")
        if self.freq_factors and len(self.freq_factors) != rope_dim // 2:
            raise ValueError(f"freq_factors has {len(self.freq_factors)} numbers, not {rope_dim // 2}")
        if self.type in ("q8_0", "q4_0") and (self.embd % BLOCK or self.ff % BLOCK):
            raise ValueError(f"{self.type} needs heads * head_dim and ff to be multiples of {BLOCK}")


@dataclass(frozen=True)
class Tensor:
    """A tensor to be drawn: shape as numpy has it (rows, columns) and standard deviation."""

    name: str
    shape: tuple[int, ...]
    sigma: float
    value: float | tuple[float, ...] = 0.0  # where sigma is 0


def tensors(shape: Shape, vocab: int) -> Iterator[Tensor]:
    """All tensors of the model, in the file's order."""
    s, wide, narrow = shape, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out_of = s.embd**-0.5
    norm_bias = s.arch == "stablelm"

    def norm(name: str, size: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (size,), 0.0, 1.0)
        if norm_bias:
            yield Tensor(f"{name}.bias", (size,), 0.0, 0.0)

    yield Tensor("token_embd.weight", (vocab, s.embd), 1.0)
    yield from norm("output_norm", s.embd)
    yield Tensor("output.weight", (vocab, s.embd), out_of)
    if s.freq_factors:
        yield Tensor("rope_freqs.weight", (len(s.freq_factors),), 0.0, s.freq_factors)
    for i in range(s.layers):
        b = f"blk.{i}."
        yield from norm(b + "attn_norm", s.embd)
        yield Tensor(b + "attn_q.weight", (wide, s.embd), s.gain * out_of)
        yield Tensor(b + "attn_k.weight", (narrow, s.embd), out_of)
        yield Tensor(b + "attn_v.weight", (narrow, s.embd), out_of)
        if s.arch == "qwen2":
            yield Tensor(b + "attn_q.bias", (wide,), 0.5)
            yield Tensor(b + "attn_k.bias", (narrow,), 0.5)
            yield Tensor(b + "attn_v.bias", (narrow,), 0.5)
        if s.arch == "qwen3":
            yield Tensor(b + "attn_q_norm.weight", (s.head_dim,), 0.0, s.gain)
            yield Tensor(b + "attn_k_norm.weight", (s.head_dim,), 0.0, 1.0)
        yield Tensor(b + "attn_output.weight", (s.embd, wide), wide**-0.5)
        yield from norm(b + "ffn_norm", s.embd)
        yield Tensor(b + "ffn_gate.weight", (s.ff, s.embd), out_of)
        yield Tensor(b + "ffn_up.weight", (s.ff, s.embd), out_of)
        yield Tensor(b + "ffn_down.weight", (s.embd, s.ff), s.ff**-0.5)


def draw(tensor: Tensor, type_: str, seed: int) -> np.ndarray[Any, Any]:
    """The tensor's data: float [shape], or uint8 [rows, bytes of a row] for a quantised type."""
    # a generator per tensor: a tensor does not depend on which others the shape has
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    count = int(np.prod(tensor.shape))
    if tensor.sigma == 0:
        return np.broadcast_to(np.asarray(tensor.value, np.float32), tensor.shape).copy()
    if len(tensor.shape) == 1:  # biases stay f32, as llama.cpp wants them
        return (tensor.sigma * rng.standard_normal(count, dtype=np.float32)).reshape(tensor.shape)
    if type_ in ("f32", "f16"):
        flat = np.empty(count, np.float32 if type_ == "f32" else np.float16)
        for i in range(0, count, CHUNK):
            n = min(CHUNK, count - i)
            flat[i : i + n] = tensor.sigma * rng.standard_normal(n, dtype=np.float32)
        return flat.reshape(tensor.shape)
    # a block is a scale (f16) and its numbers; a uniform byte has deviation 73.9, a uniform nibble 4.61
    size, deviation = (BLOCK, 73.9) if type_ == "q8_0" else (BLOCK // 2, 4.61)
    blocks = np.empty((count // BLOCK, 2 + size), np.uint8)
    blocks[:, :2] = np.array([tensor.sigma / deviation], np.float16).view(np.uint8)
    for i in range(0, len(blocks), CHUNK // BLOCK):
        part = blocks[i : i + CHUNK // BLOCK, 2:]
        part[:] = np.frombuffer(rng.bytes(part.size), np.uint8).reshape(part.shape)
    return blocks.reshape(tensor.shape[0], -1)


def ggml_type(tensor: Tensor, type_: str) -> gguf.GGMLQuantizationType:
    """The type that the tensor is stored in: norms, biases and factors are f32."""
    name = type_ if tensor.sigma != 0 and len(tensor.shape) > 1 else "f32"
    return gguf.GGMLQuantizationType[name.upper()]


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Hyperparameters, as llama.cpp reads them."""
    writer.add_name(f"random {shape.arch} {shape.layers}x{shape.embd} seed {shape.seed}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.ctx)
    writer.add_embedding_length(shape.embd)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    if shape.arch == "stablelm":
        writer.add_layer_norm_eps(1e-5)
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.rope_dim or shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.yarn_factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(shape.yarn_factor)
        writer.add_rope_scaling_orig_ctx_len(shape.yarn_orig_ctx)


def borrow_tokenizer(writer: gguf.GGUFWriter, source: Path) -> int:
    """Copy all tokenizer fields of another GGUF file; returns the number of tokens."""
    reader = gguf.GGUFReader(source)
    for name, entry in reader.fields.items():
        if not name.startswith("tokenizer."):
            continue
        kind, *inner = entry.types
        writer.add_key_value(name, entry.contents(), kind, sub_type=inner[-1] if inner else None)
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def make_random_model(path: str | Path, shape: Shape | None = None, **changes: Any) -> Path:
    """Write a random model to `path` and return it.

    changes: fields of Shape, e.g. make_random_model(p, arch="qwen3", layers=3).

    Raises:
        ValueError: no model can have this shape.
    """
    s = Shape(**changes) if shape is None else shape
    s.check()
    path = Path(path)
    writer = gguf.GGUFWriter(path, s.arch)
    add_metadata(writer, s)
    if s.tokenizer is None:
        writer.add_vocab_size(s.vocab)
        writer.add_tokenizer_model("no_vocab")
        vocab = s.vocab
    else:
        vocab = borrow_tokenizer(writer, Path(s.tokenizer))
        writer.add_vocab_size(vocab)
    planned = list(tensors(s, vocab))
    for t in planned:
        kind = ggml_type(t, s.type)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(t.shape)) // block * size
        quantised = kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)
        stored = (*t.shape[:-1], t.shape[-1] // block * size) if quantised else t.shape
        numpy_type = np.dtype(np.uint8 if quantised else (np.float16 if kind.name == "F16" else np.float32))
        writer.add_tensor_info(t.name, stored, numpy_type, n_bytes, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    layer: dict[str, np.ndarray[Any, Any]] = {}
    for t in planned:
        name = re.sub(r"^blk\.\d+\.", "", t.name)
        data = layer[name] if s.same_layers and name in layer else draw(t, s.type, s.seed)
        if s.same_layers and name != t.name:
            layer[name] = data
        writer.write_tensor_data(data)
    writer.close()
    return path


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a GGUF model with random weights.")
    parser.add_argument("path", type=Path)
    default = Shape()
    for name in ("layers", "heads", "kv_heads", "head_dim", "ff", "vocab", "seed", "ctx", "yarn_orig_ctx"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(default, name))
    parser.add_argument("--arch", choices=ARCHS, default=default.arch)
    parser.add_argument("--type", choices=TYPES, default=default.type)
    parser.add_argument("--rope-base", type=float, default=default.rope_base)
    parser.add_argument("--rope-dim", type=int, default=None)
    parser.add_argument("--freq-factors", type=lambda t: tuple(map(float, t.split(","))), default=())
    parser.add_argument("--yarn-factor", type=float, default=0.0)
    parser.add_argument(
        "--tokenizer", type=Path, default=None, help="GGUF file to borrow the vocabulary from"
    )
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--same-layers", action="store_true", help="all layers hold the first one's weights")
    values = vars(parser.parse_args(argv))
    try:
        path = make_random_model(values.pop("path"), **values)
    except (ValueError, OSError) as err:
        print(f"make_random_model: error: {err}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
