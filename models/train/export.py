"""Write a trained reasoner as GGUF, with its tokenizer: python models/train/export.py --help."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from generate import load
from model import causal
from text import CHAT_TEMPLATE, CONTROL, END, IM_END, SHOWN, Corpus, problem

NAME = "rkv-reasoner"
# What check() may find. F32 differs by the order of sums; Q8_0 rounds a weight to 1/127 of the largest of 32.
FAR = {"F32": 1e-3, "Q8_0": 0.2}


def tokens_of(tokenizer: dict[str, Any], n_vocab: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens and their types in order of id, padded with unused ones, and the merges."""
    vocab = tokenizer["model"]["vocab"]
    texts = [f"<|unused{i}|>" for i in range(n_vocab)]
    types = [int(gguf.TokenType.UNUSED)] * n_vocab
    for text, i in vocab.items():
        texts[i] = text
        types[i] = int(gguf.TokenType.NORMAL)
        if text in CONTROL:
            types[i] = int(gguf.TokenType.CONTROL)
        elif text in SHOWN:
            types[i] = int(gguf.TokenType.USER_DEFINED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    return texts, types, merges


def export(folder: Path, out: Path, quantised: bool = True) -> None:
    """Write `out`, a GGUF file with matrices in Q8_0 or F32 and norms in F32.

    folder: of train.py (checkpoint.pt, tokenizer.json).
    """
    model = load(folder, "cpu")
    cfg = model.cfg
    w = gguf.GGUFWriter(str(out), "qwen3")
    w.add_name(NAME)
    w.add_description(
        "Solves chains of quantities, long arithmetic and sorting in long traces. Trained by models/train."
    )
    w.add_license("mit")
    w.add_context_length(cfg.n_ctx)
    w.add_embedding_length(cfg.n_embd)
    w.add_block_count(cfg.n_layer)
    w.add_feed_forward_length(cfg.n_ff)
    w.add_head_count(cfg.n_head)
    w.add_head_count_kv(cfg.n_head_kv)
    w.add_key_length(cfg.n_embd_head)
    w.add_value_length(cfg.n_embd_head)
    w.add_rope_freq_base(cfg.rope_base)
    w.add_layer_norm_rms_eps(cfg.norm_eps)
    w.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0 if quantised else gguf.LlamaFileType.ALL_F32))
    texts, types, merges = tokens_of(json.loads((folder / "tokenizer.json").read_text()), cfg.n_vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(texts)
    w.add_token_types(types)
    w.add_token_merges(merges)
    w.add_eos_token_id(IM_END)
    w.add_eot_token_id(IM_END)
    w.add_pad_token_id(END)
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)
    for name, p in model.state_dict().items():
        name = name.replace("layers.", "blk.")
        data = p.detach().numpy().astype(np.float32)
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            w.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def check(folder: Path, path: Path, ids: list[int]) -> float:
    """Largest difference between PyTorch's logits and llama.cpp's over a text, in units of their spread.

    folder, path: as in export(); ids [n]. Needs rkv_local's library.
    """
    from rkv_local import Llama

    model = load(folder, "cpu")
    with torch.no_grad():
        want = model.logits(model(torch.tensor(ids), torch.arange(len(ids)), causal)).numpy()
    # float32 also in the cache, and no flash attention, which rounds to half precision
    llama = Llama(
        str(path),
        kv=None,
        n_ctx=len(ids),
        n_batch=len(ids),
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    llama.eval(ids)
    got = llama.scores[: len(ids)]
    llama.close()
    return float(np.abs(got - want).max() / want.std())


def main(argv: list[str] | None = None) -> None:
    """Export, then compare with PyTorch."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="folder of train.py")
    p.add_argument("--out", type=Path, required=True, help="the GGUF file")
    p.add_argument("--f32", action="store_true", help="not quantised")
    p.add_argument("--check", action="store_true", help="compare logits over one problem (needs rkv_local)")
    a = p.parse_args(argv)
    export(a.model, a.out, not a.f32)
    print(f"{a.out}: {a.out.stat().st_size / 1e6:.1f} MB")
    if a.check:
        from tokenizers import Tokenizer

        state = torch.load(a.model / "checkpoint.pt", weights_only=True)
        corpus = Corpus(Tokenizer.from_file(str(a.model / "tokenizer.json")), 0, state["config"]["n_ctx"])
        ids, _ = corpus.document(problem("chain", "dense", "dev", 1))
        ids = ids[: corpus.n_ctx]
        far, limit = check(a.model, a.out, ids.tolist()), FAR["F32" if a.f32 else "Q8_0"]
        print(f"largest difference of a logit over {len(ids)} tokens: {far:.5f} of their spread")
        if not far < limit:
            sys.exit(f"{a.out} does not compute what PyTorch does: at most {limit} was expected")


if __name__ == "__main__":
    main()
