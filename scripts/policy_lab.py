"""A laboratory for policies: the reasoner in PyTorch over known traces, a formula choosing each head's cells.

Teacher-forced: each token is predicted from the cells that a policy kept, and the true token follows. That is
quick (a block of tokens at a time) and says which formula loses what is needed; whether answers stay right is
measured in the engine (rkv-local eval). Errors are counted on tokens that the full cache predicts right.

    python scripts/policy_lab.py --model DIR --kind dense --budget 320,512 "rkv" "latest n_sim=2 lam=0.1"

DIR is a folder of models/train/train.py. A configuration is a policy's name and settings; see SETTINGS.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models" / "train"))
from generate import load
from model import Reasoner, rope_tables, rotate
from text import Corpus, problem


@dataclass(frozen=True)
class Settings:
    """One configuration; names as in KVBudget where it has them.

    sim: what `latest` compares: "key" (without RoPE), "rotated", "value", "both" (the smaller of key and
        value).
    norm: what importance is divided by before it is weighed: "max" or "mean" over the candidates.
    value: of the values' lengths, as shares of the longest.
    shares: budgets by layer: "uniform", "oracle" (what each layer wins in one ranking by future attention),
        or numbers with / between them that are normalised.
    pin: pinned first tokens; -1 is the prompt.
    """

    policy: str = "rkv"
    budget: int = 512
    buffer: int = 128
    window: int = 8
    lam: float = 0.1
    pin: int = 4
    pool: int = 7
    threshold: float = 0.5
    n_sim: int = 1
    memory: float = 0.0
    sim: str = "key"
    norm: str = "max"
    value: float = 0.0
    value_weight: float = 0.0
    shares: str = "uniform"
    blocks: int = 0  # oracle: how many blocks it looks ahead; 0 is all


@dataclass
class Cells:
    """What a layer holds: tensors [batch, head, n, ..]."""

    k: Tensor
    raw: Tensor
    v: Tensor
    pos: Tensor
    best: Tensor  # [.., n, 4] highest similarities to later keys
    imp: Tensor  # remembered importance
    future: Tensor | None = None  # attention that each cell will still get

    def take(self, idx: Tensor) -> Cells:
        """Rows idx [batch, head, m]."""

        def rows(x: Tensor) -> Tensor:
            if x.ndim == 3:
                return x.gather(2, idx)
            return x.gather(2, idx[..., None].expand(*idx.shape, x.shape[-1]))

        return Cells(
            rows(self.k), rows(self.raw), rows(self.v), rows(self.pos), rows(self.best), rows(self.imp)
        )


def importance(c: Cells, q: Tensor, s: Settings, n_cand: int, scale: float) -> Tensor:
    """[batch, head, n_cand]; q [batch, head, group, window, d]."""
    logits = torch.einsum("bhgwd,bhnd->bhgwn", q, c.k[:, :, :n_cand]) * scale
    w = logits.amax(2).softmax(-1).mean(2)
    return F.max_pool1d(w, s.pool, 1, s.pool // 2) if s.pool > 1 else w


def redundancy(c: Cells, s: Settings, x: Tensor) -> Tensor:
    """R-KV's R over all n, of vectors x."""
    unit = F.normalize(x, dim=-1)
    sim = unit @ unit.transpose(-1, -2)
    n = sim.shape[-1]
    sim.diagonal(dim1=-2, dim2=-1).zero_()
    order = torch.arange(1, n + 1, device=x.device)
    last = ((sim > s.threshold) * order).amax(-1)  # 0: none
    hit = last > 0
    sim.scatter_(
        -1,
        (last - 1).clamp(min=0)[..., None],
        torch.where(hit[..., None], 0.0, sim.gather(-1, (last - 1).clamp(min=0)[..., None])),
    )
    return sim.mean(-2).softmax(-1)


def later(c: Cells, s: Settings, n_new: int) -> Tensor:
    """Mean of the n_sim highest similarities to a later cell; stored in c.best."""

    def sims(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=-1)
        return unit @ unit[:, :, -n_new:].transpose(-1, -2)

    if s.sim == "rotated":
        sim = sims(c.k)
    elif s.sim == "value":
        sim = sims(c.v)
    elif s.sim == "both":
        sim = torch.minimum(sims(c.raw), sims(c.v))
    elif s.sim == "mean":
        sim = (sims(c.raw) + sims(c.v)) / 2
    else:
        sim = sims(c.raw)
    n = sim.shape[2]
    i = torch.arange(n, device=sim.device)[:, None]
    j = torch.arange(n - n_new, n, device=sim.device)[None]
    sim = sim.masked_fill(j <= i, -1.0)
    c.best = torch.cat((c.best, sim.topk(min(4, n_new), dim=-1).values), -1).topk(4, dim=-1).values
    return c.best[..., : s.n_sim].mean(-1)


def score(c: Cells, q: Tensor, s: Settings, n_new: int, scale: float) -> Tensor:
    """z of the candidates, [batch, head, n - window]."""
    n_cand = c.k.shape[2] - s.window
    if s.policy == "streaming":
        return c.pos[:, :, :n_cand].float()
    if s.policy == "oracle":
        assert c.future is not None
        return c.future[:, :, :n_cand]
    if s.policy == "keydiff":
        unit = F.normalize(c.k, dim=-1)
        return -(unit @ F.normalize(unit.mean(2, keepdim=True), dim=-1).transpose(-1, -2))[..., :n_cand, 0]
    imp = importance(c, q, s, n_cand, scale)
    if s.memory > 0:
        unit = imp / imp.amax(-1, keepdim=True)
        imp = torch.maximum(s.memory * c.imp[:, :, :n_cand], unit)
        c.imp[:, :, :n_cand] = imp
    if s.policy == "snapkv":
        z = imp
    elif s.policy == "rkv":
        z = s.lam * imp - (1 - s.lam) * redundancy(c, s, c.k)[..., :n_cand]
    elif s.policy == "rkv-raw":
        z = s.lam * imp - (1 - s.lam) * redundancy(c, s, c.raw)[..., :n_cand]
    elif s.policy == "latest":
        top = imp.amax(-1, keepdim=True) if s.norm == "max" else imp.mean(-1, keepdim=True)
        z = s.lam * imp / top - (1 - s.lam) * later(c, s, n_new)[..., :n_cand]
    else:
        raise SystemExit(f"no policy {s.policy!r} here")
    if s.value > 0:
        length = c.v.norm(dim=-1)[:, :, :n_cand]
        z = z + s.value * length / length.amax(-1, keepdim=True)
    if s.value_weight > 0:
        far = (c.v - c.v.mean(2, keepdim=True)).norm(dim=-1)[:, :, :n_cand]
        z = logistic(z) + s.value_weight * logistic(far)
    return z


def logistic(x: Tensor) -> Tensor:
    """Shares of a logistic distribution with the mean and deviation of the last dimension."""
    spread = (x.var(-1, keepdim=True, correction=0) + 1e-12).sqrt()
    return torch.sigmoid(1.702 * (x - x.mean(-1, keepdim=True)) / spread)


class Lab:
    """Traces of development problems, and what the full cache predicts for them."""

    def __init__(self, model: Reasoner, corpus: Corpus, problems: list[Any], device: str) -> None:
        self.model, self.device, cfg = model, device, model.cfg
        docs = [corpus.document(p) for p in problems]
        self.n = torch.tensor([len(ids) for ids, _ in docs])
        self.prompt = torch.tensor([len(corpus.prompt(p)) for p in problems])
        longest = int(self.n.max())
        self.tokens = torch.zeros(len(docs), longest, dtype=torch.long)
        self.judged = torch.zeros(len(docs), longest, dtype=torch.bool)
        for i, (ids, learned) in enumerate(docs):
            self.tokens[i, : len(ids)] = torch.from_numpy(ids).long()
            self.judged[i, : len(ids)] = torch.from_numpy(learned)
        self.tokens, self.judged = self.tokens.to(device), self.judged.to(device)
        self.scale = cfg.n_embd_head**-0.5
        self.attention: list[list[Tensor]] | None = None  # by block and layer: [problems, head, past + block]
        right, _ = self.run(Settings(budget=1 << 20))
        self.judged = self.judged & right

    def look_ahead(self, buffer: int) -> None:
        """Fill self.attention with what the full cache attends to."""
        self.attention = []
        self.run(Settings(budget=1 << 20, buffer=buffer), self.attention)

    def future(self, layer: int, block: int, n: int, s: Settings) -> Tensor:
        """Attention that positions 0 .. n - 1 of a layer will get behind a block: [problems, head, n]."""
        assert self.attention is not None
        last = block + 1 + s.blocks if s.blocks else len(self.attention)
        later = [self.attention[b][layer][..., :n] for b in range(block + 1, min(last, len(self.attention)))]
        return torch.stack(later).sum(0) if later else torch.zeros_like(self.attention[block][layer][..., :n])

    def oracle_shares(self, budget: int, buffer: int) -> list[float]:
        """The share of cells that a layer wins in one ranking of all layers and heads by future attention."""
        assert self.attention is not None
        won = torch.zeros(self.model.cfg.n_layer)
        s = Settings(buffer=buffer)
        for block in range(len(self.attention) - 1):
            n = self.attention[block][0].shape[-1]
            if n <= budget:
                continue
            z = torch.stack(
                [self.future(il, block, n, s) for il in range(len(won))]
            )  # [layer, problem, head, n]
            flat = z.transpose(0, 1).flatten(1)
            bar = flat.topk(budget * z.shape[0] * z.shape[2], dim=1).values[:, -1]
            won += (z > bar[None, :, None, None]).sum((1, 2, 3)).cpu()
        return (won / won.sum()).tolist()

    def run(self, s: Settings, attention: list[list[Tensor]] | None = None) -> tuple[Tensor, float]:
        """Which tokens are predicted right, [problems, longest], and seconds.

        attention: takes what the tokens looked at.
        """
        begun = time.time()
        m, cfg = self.model, self.model.cfg
        n_seq, longest = self.tokens.shape
        h, d, group = cfg.n_head_kv, cfg.n_embd_head, cfg.n_head // cfg.n_head_kv
        dtype = m.token_embd.weight.dtype
        right = torch.zeros_like(self.judged)
        empty = torch.zeros(n_seq, h, 0, d, dtype=dtype, device=self.device)
        cells = [
            Cells(
                empty,
                empty,
                empty,
                empty[..., 0].long(),
                torch.zeros(n_seq, h, 0, 4, device=self.device),
                empty[..., 0].float(),
            )
            for _ in m.layers
        ]
        if (s.policy == "oracle" or s.shares == "oracle") and self.attention is None:
            self.look_ahead(s.buffer)
        shares = [1.0] * cfg.n_layer
        if s.shares == "oracle":
            shares = self.oracle_shares(s.budget, s.buffer)
            print("shares", "/".join(f"{x * len(shares):.2f}" for x in shares), file=sys.stderr)
        elif s.shares != "uniform":
            shares = [float(x) for x in s.shares.split("/")]
        total = sum(shares)
        budgets = [max(s.window + 8, round(s.budget * cfg.n_layer * x / total)) for x in shares]
        pin = self.prompt.to(self.device) if s.pin < 0 else torch.full((n_seq,), s.pin, device=self.device)
        for t0 in range(0, longest, s.buffer):
            block = self.tokens[:, t0 : t0 + s.buffer]
            nb = block.shape[1]
            x = m.token_embd(block)
            pos = torch.arange(t0, t0 + nb, device=self.device)
            cos, sin = rope_tables(cfg, pos)
            rope = (cos[None], sin[None])
            scores: list[Tensor | None] = []
            queries = []
            seen: list[Tensor] = []
            if attention is not None:
                attention.append(seen)
            for il, layer in enumerate(m.layers):
                hid = layer.attn_norm(x)
                q = layer.attn_q_norm(layer.attn_q(hid).view(n_seq, nb, -1, d))
                raw = layer.attn_k_norm(layer.attn_k(hid).view(n_seq, nb, -1, d))
                v = layer.attn_v(hid).view(n_seq, nb, -1, d).transpose(1, 2)
                q = rotate(q, rope).transpose(1, 2)
                k = rotate(raw, rope).transpose(1, 2)
                c = cells[il]
                c.k = torch.cat((c.k, k), 2)
                c.raw = torch.cat((c.raw, raw.transpose(1, 2)), 2)
                c.v = torch.cat((c.v, v), 2)
                c.pos = torch.cat((c.pos, pos.expand(n_seq, h, nb)), 2)
                c.best = F.pad(c.best, (0, 0, 0, nb), value=-1.0)
                c.imp = F.pad(c.imp, (0, nb))
                past = c.k.shape[2] - nb
                mask = torch.ones(nb, past + nb, dtype=torch.bool, device=self.device).tril(past)
                out = F.scaled_dot_product_attention(q, c.k, c.v, attn_mask=mask, enable_gqa=True)
                if attention is not None:
                    grouped = q.reshape(n_seq, h, group, nb, d)
                    logits = torch.einsum("bhgtd,bhnd->bhgtn", grouped, c.k) * self.scale
                    w = logits.masked_fill(~mask, float("-inf")).softmax(-1)
                    w = w * (pos[None] < self.n.to(self.device)[:, None])[:, None, None, :, None]
                    seen.append(w.sum((2, 3)))
                x = x + layer.attn_output(out.transpose(1, 2).flatten(2))
                hid = layer.ffn_norm(x)
                x = x + layer.ffn_down(F.silu(layer.ffn_gate(hid)) * layer.ffn_up(hid))
                queries.append(q[:, :, -s.window :].reshape(n_seq, h, group, -1, d).float())
            best = m.logits(m.output_norm(x)).argmax(-1)
            end = min(t0 + nb + 1, longest)
            right[:, t0 + 1 : end] = best[:, : end - t0 - 1] == self.tokens[:, t0 + 1 : end]
            if s.budget >= longest:
                continue
            n_new = nb
            for il, c in enumerate(cells):
                n = c.k.shape[2]
                if s.policy == "oracle":
                    future = self.future(il, t0 // s.buffer, t0 + nb, s)
                    c.future = future.gather(2, c.pos)
                if n <= budgets[il]:
                    if s.policy == "latest":
                        later(c, s, n_new)
                    scores.append(None)
                    continue
                z = score(c, queries[il], s, n_new, self.scale)
                fixed = c.pos[:, :, : n - s.window] < pin[:, None, None]
                scores.append(z.float().masked_fill(fixed, float("inf")))
            self.select(cells, scores, budgets, s)
        return right, time.time() - begun

    def select(
        self, cells: list[Cells], scores: list[Tensor | None], budgets: list[int], s: Settings
    ) -> None:
        """Keep the best of each layer and head, and the window."""
        for il, z in enumerate(scores):
            if z is None:
                continue
            c = cells[il]
            n = c.k.shape[2]
            idx = z.topk(budgets[il] - s.window, dim=-1).indices
            tail = torch.arange(n - s.window, n, device=idx.device).expand(*idx.shape[:2], s.window)
            cells[il] = c.take(torch.cat((idx, tail), -1).sort(-1).values)

    def report(self, s: Settings) -> dict[str, Any]:
        """Errors per 1,000 judged tokens, and problems without an error."""
        with torch.no_grad():
            right, seconds = self.run(s)
        wrong = self.judged & ~right
        per = wrong.sum(1)
        return {
            "per_1000": round(1000 * float(wrong.sum()) / float(self.judged.sum()), 3),
            "clean": int((per == 0).sum()),
            "of": len(per),
            "seconds": round(seconds, 1),
        }


def parse(text: str, budget: int) -> Settings:
    """ "latest n_sim=2 lam=0.2" as Settings."""
    name, *rest = text.split()
    values: dict[str, Any] = {"policy": name, "budget": budget}
    for part in rest:
        key, value = part.split("=")
        kind = type(getattr(Settings(), key))
        values[key] = kind(value)
    return Settings(**values)


def main() -> None:
    """Run the configurations and print a line of JSON each."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--family", default="chain")
    p.add_argument("--kind", default="dense")
    p.add_argument("--n", type=int, default=24, help="development problems")
    p.add_argument("--start", type=int, default=1000, help="number of the first")
    p.add_argument("--budget", default="512", help="cells, with commas; N%% of the mean document")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("config", nargs="+")
    a = p.parse_args()
    from tokenizers import Tokenizer

    if a.threads:
        torch.set_num_threads(a.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(a.model, device)
    corpus = Corpus(Tokenizer.from_file(str(a.model / "tokenizer.json")), 7, model.cfg.n_ctx)
    corpus.rng = random.Random("policy lab")
    with torch.no_grad():
        lab = Lab(model, corpus, [problem(a.family, a.kind, "dev", a.start + i) for i in range(a.n)], device)
    mean = float(lab.n.float().mean())
    print(
        json.dumps(
            {
                "kind": a.kind,
                "n": a.n,
                "mean": round(mean),
                "prompt": round(float(lab.prompt.float().mean())),
                "judged": int(lab.judged.sum()),
            }
        ),
        flush=True,
    )
    for budget in a.budget.split(","):
        cells = round(mean * float(budget[:-1]) / 100) if budget.endswith("%") else int(budget)
        for text in a.config:
            s = parse(text, cells)
            print(json.dumps({"budget": budget, "cells": cells, "config": text, **lab.report(s)}), flush=True)


if __name__ == "__main__":
    main()
