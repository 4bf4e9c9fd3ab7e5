"""Train the reasoner on problems made on the fly: python models/train/train.py --help.

The run that made the shipped model, and how to repeat it, is in models/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from model import Config, Reasoner, block_mask, masked, one_by_one, packed
from text import Corpus, gym_entries, sample_texts, train_tokenizer

MAX_DOCS = 1024  # in one step; the rest of `starts` repeats the end


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the checkpoint, tokenizer and log; an unfinished run goes on",
    )
    p.add_argument("--steps", type=int, default=7000)
    p.add_argument("--tokens", type=int, default=131072, help="per step")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--warmup", type=int, default=200)
    p.add_argument("--decay", type=float, default=0.1, help="weight decay")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    p.add_argument("--limit", type=float, default=math.inf, help="seconds after which to save and stop")
    p.add_argument(
        "--gym", type=Path, help="reasoning-gym entries, pickled by text.gym_entries; made where absent"
    )
    p.add_argument("--gym-entries", type=int, default=60000)
    p.add_argument(
        "--short",
        type=str,
        default="0.08:1536,0.2:2560",
        help="until which share of the run documents are at most how long",
    )
    p.add_argument(
        "--cut",
        type=str,
        default="0.3:0.8",
        help="until which share of the run which share of the chains ends when it is in order",
    )
    p.add_argument(
        "--no-hints", action="store_true", help="traces without 'After NAME:' where facts are put in order"
    )
    p.add_argument("--init", type=Path, help="weights to begin with: model.pt of another run")
    p.add_argument("--attention", choices=("varlen", "flex", "one"), default="varlen")
    p.add_argument("--no-compile", action="store_true")
    for name, value in Config().as_dict().items():
        p.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    return p.parse_args(argv)


def scheduled(share: float, schedule: str, then: float) -> float:
    """The value at a share of the run of "until:value,until:value"; `then` behind the last."""
    for part in filter(None, schedule.split(",")):
        until, value = part.split(":")
        if share < float(until):
            return float(value)
    return then


def produce(queue: Any, worker: int, a: argparse.Namespace, tokenizer: str, gym: Any, done: int) -> None:
    """Batches for steps done + worker, done + worker + workers, ..: tokens, targets (-1: not learned), starts."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    seed = 1 + a.seed * 4096 + worker + 64 * (done > 0)
    corpus = Corpus(Tokenizer.from_str(tokenizer), seed, a.n_ctx, gym, not a.no_hints)
    for step in range(done + worker, a.steps, a.workers):
        tokens = np.zeros(a.tokens, np.int16)
        target = np.full(a.tokens, -1, np.int16)
        starts = [0]
        longest = int(scheduled(step / a.steps, a.short, a.n_ctx))
        for ids, learned in corpus.documents(min(longest, a.n_ctx), scheduled(step / a.steps, a.cut, 0.0)):
            at = starts[-1]
            ids, learned = ids[: a.tokens - at], learned[: a.tokens - at]
            end = at + len(ids)
            tokens[at:end] = ids
            target[at : end - 1] = np.where(learned[1:], ids[1:], -1)
            starts.append(end)
            if end == a.tokens:
                break
        queue.put((step, tokens, target, np.array(starts, np.int32)))


def batches(a: argparse.Namespace, tokenizer: str, gym: Any, done: int) -> Any:
    """Batches in order of step."""
    context = mp.get_context("fork")
    queues = [context.Queue(4) for _ in range(a.workers)]
    team = [
        context.Process(target=produce, args=(q, i, a, tokenizer, gym, done), daemon=True)
        for i, q in enumerate(queues)
    ]
    for process in team:
        process.start()
    try:
        for step in range(done, a.steps):
            got, *arrays = queues[(step - done) % a.workers].get(timeout=120)
            assert got == step
            yield step, *arrays
    finally:
        for process in team:
            process.terminate()


def learning_rate(step: int, a: argparse.Namespace) -> float:
    """Linear warm-up, then a half cosine to a hundredth."""
    if step < a.warmup:
        return float(a.lr * (step + 1) / a.warmup)
    x = (step - a.warmup) / max(1, a.steps - a.warmup)
    return float(a.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, x)))))


def loss_of(model: Reasoner, tokens: Tensor, target: Tensor, pos: Tensor, attend: Any, where: Any) -> Tensor:
    """Mean cross-entropy of what is learned."""
    logits = model.logits(model(tokens, pos, attend, where))
    return F.cross_entropy(logits.float(), target, ignore_index=-1)


def main(argv: list[str] | None = None) -> None:
    """Train, or go on training."""
    begun = time.time()
    a = arguments(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    cfg = Config(**{name: getattr(a, name) for name in Config().as_dict()})

    if a.gym and a.gym.exists():
        gym = pickle.loads(a.gym.read_bytes())
    else:
        gym = gym_entries(a.gym_entries)
    saved_tokenizer = a.out / "tokenizer.json"
    if not saved_tokenizer.exists():
        train_tokenizer(cfg.n_vocab, sample_texts(4000 if device == "cuda" else 400, gym)).save(
            str(saved_tokenizer)
        )
    tokenizer = saved_tokenizer.read_text()

    model = Reasoner(cfg).to(device)
    if a.init:
        model.load_state_dict(
            {k: v.float() for k, v in torch.load(a.init, map_location=device, weights_only=True).items()}
        )
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": a.decay}, {"params": others, "weight_decay": 0.0}],
        lr=a.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    done, log = 0, []
    checkpoint = a.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, log = state["step"], state["log"]
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params / 1e6:.2f} M parameters on {device}, from step {done} of {a.steps}", flush=True)

    step_fn = loss_of if a.no_compile or device == "cpu" else torch.compile(loss_of, dynamic=False)
    trained, since, at = 0, time.time(), done
    running: list[Tensor] = []
    step = done
    for step, tokens, target, starts in batches(a, tokenizer, gym, done):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, a)
        x = torch.from_numpy(tokens).to(device, non_blocking=True).int()
        y = torch.from_numpy(target).to(device, non_blocking=True).long()
        edges = np.full(max(MAX_DOCS, len(starts)), starts[-1], np.int32)
        edges[: len(starts)] = starts
        doc = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        pos = torch.from_numpy(np.arange(a.tokens) - starts[doc]).to(device, non_blocking=True)
        attend: Any
        where: Any
        if device == "cpu" or a.attention == "one":
            attend, where = one_by_one, starts.tolist()
        elif a.attention == "varlen":
            attend, where = packed, (torch.from_numpy(edges).to(device), a.n_ctx)
        else:
            attend, where = masked, block_mask(torch.from_numpy(doc).to(device))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = step_fn(model, x, y, pos, attend, where)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.detach())
        trained += a.tokens
        if (step + 1) % 50 == 0 or step + 1 == a.steps or step == done:
            mean = float(torch.stack(running).mean())
            running.clear()
            now = time.time()
            rate = (step + 1 - at) * a.tokens / (now - since)
            since, at = now, step + 1
            log.append(
                {
                    "step": step + 1,
                    "loss": round(mean, 5),
                    "tokens_per_s": round(rate),
                    "lr": learning_rate(step, a),
                }
            )
            print(f"step {step + 1} loss {mean:.4f} {rate / 1e3:.0f}k tok/s {now - begun:.0f} s", flush=True)
        if time.time() - begun > a.limit:
            break
    finished = step + 1 >= a.steps
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step + 1,
            "log": log,
            "config": cfg.as_dict(),
        },
        checkpoint,
    )
    torch.save({k: v.half() for k, v in model.state_dict().items()}, a.out / "model.pt")
    about = {
        "parameters": n_params,
        "config": cfg.as_dict(),
        "steps": step + 1,
        "of": a.steps,
        "tokens_per_step": a.tokens,
    }
    about |= {
        "seed": a.seed,
        "lr": a.lr,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "log": log,
    }
    (a.out / "train.json").write_text(json.dumps(about, indent=1) + "\n")
    print("finished" if finished else "to be continued", f"{time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
