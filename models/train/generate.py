"""Greedy answers of a trained reasoner in PyTorch, many problems at once: a check before it is exported."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Config, Reasoner, rope_tables
from text import FAMILIES, IM_END, KINDS, SPLITS, Problem, problem, prompt_ids


def load(folder: Path, device: str) -> Reasoner:
    """The model of a checkpoint; leaves with one line if there is none."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        sys.exit(f"{path} does not exist: train.py writes it")
    state = torch.load(path, map_location=device, weights_only=True)
    model = Reasoner(Config(**state["config"])).to(device)
    model.load_state_dict(state["model"])
    return model.eval()


def append_and_attend(
    keys: Tensor, values: Tensor, t: int, q: Tensor, k: Tensor, v: Tensor, where: Any
) -> Tensor:
    """Attention of token t of n sequences in a layer; keys and values [n, n_head_kv, n_ctx, d] grow by it."""
    keys[:, :, t], values[:, :, t] = k, v
    past = keys[:, :, : t + 1], values[:, :, : t + 1]
    return F.scaled_dot_product_attention(q[:, :, None], *past, enable_gqa=True)[:, :, 0]


@torch.no_grad()
def greedy(model: Reasoner, prompts: list[list[int]], n_ctx: int) -> list[list[int]]:
    """Continuations up to the end token, or to n_ctx tokens in all.

    All sequences are at the same position; prompts are forced.
    """
    cfg, device = model.cfg, next(model.parameters()).device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model.to(dtype)
    n = len(prompts)
    shape = (cfg.n_layer, n, cfg.n_head_kv, n_ctx, cfg.n_embd_head)
    keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    forced = torch.full((n, n_ctx + 1), -1, dtype=torch.long, device=device)
    for i, p in enumerate(prompts):
        forced[i, : len(p)] = torch.tensor(p)
    out = torch.zeros((n, n_ctx + 1), dtype=torch.long, device=device)
    out[:, 0] = forced[:, 0]
    ended = torch.zeros(n, dtype=torch.bool, device=device)
    for t in range(n_ctx):
        x = model.token_embd(out[:, t])
        rope = rope_tables(cfg, torch.full((1,), t, device=device))
        for il, layer in enumerate(model.layers):
            x = layer(x, rope, functools.partial(append_and_attend, keys[il], values[il], t))
        following = model.logits(model.output_norm(x)).argmax(-1)
        given = forced[:, t + 1]
        out[:, t + 1] = torch.where(given >= 0, given, following)
        ended |= (out[:, t + 1] == IM_END) & (given < 0)
        if t % 64 == 0 and bool(ended.all()):
            break
    rows = out.tolist()
    result = []
    for i, p in enumerate(prompts):
        tail = rows[i][len(p) : t + 2]
        result.append(tail[: tail.index(IM_END)] if IM_END in tail else tail)
    return result


def answer_of(text: str) -> str:
    """What follows </think>, without the words around it."""
    last = text.rpartition("</think>")[2].strip()
    return last.removeprefix("The answer is ").removesuffix(".")


def mixed(split: str, n: int) -> list[Problem]:
    """n problems of each family and kind."""
    return [problem(f, k, split, i) for f in FAMILIES for k in KINDS for i in range(n)]


def main() -> None:
    """Accuracy by family and kind."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="folder of train.py")
    p.add_argument("--n", type=int, default=50, help="problems of each family and kind")
    p.add_argument("--split", default="dev", choices=list(SPLITS), help="which problems (default: dev)")
    p.add_argument("--problems", type=Path, help="problems made before: JSON lines of id, question, answer")
    a = p.parse_args()
    from tokenizers import Tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(a.model, device)
    tok = Tokenizer.from_file(str(a.model / "tokenizer.json"))
    asked: list[Any]
    if a.problems:
        asked = [json.loads(line) for line in a.problems.read_text().splitlines()]
    else:
        asked = [{"id": q.id, "question": q.question, "answer": q.answer} for q in mixed(a.split, a.n)]
    begun = time.time()
    got = greedy(model, [prompt_ids(tok, q["question"]) for q in asked], model.cfg.n_ctx)
    right: dict[str, list[tuple[bool, int]]] = defaultdict(list)
    shown = 0
    for q, ids in zip(asked, got, strict=True):
        ok = answer_of(tok.decode(ids, skip_special_tokens=False)) == q["answer"]
        right["/".join(q["id"].split("/")[:2])].append((ok, len(ids)))
        if not ok and shown < 3:
            shown += 1
            print(q["id"], q["answer"], "got:", tok.decode(ids, skip_special_tokens=False)[-300:])
    right["all"] = [row for rows in right.values() for row in rows]
    for name, rows in right.items():
        tokens = sum(n for _, n in rows) / len(rows)
        print(f"{name}: {sum(ok for ok, _ in rows)} of {len(rows)} right, {tokens:.0f} tokens on average")
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
