"""Train the reasoner on problems made on the fly: python models/train/train.py --help.

The run that made the shipped model, and how to repeat it, is in models/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model import Config, Reasoner, block_mask, masked, one_by_one, packed
from text import SEEDS, STEPS, Corpus, gym_entries, sample_texts, train_tokenizer

MAX_DOCS = 1024  # in one step; the rest of `starts` repeats the end
SAVE_EVERY = 500  # steps
LOG_EVERY = 50

# tokens [n] int16, targets [n] int16 (-1: not learned), starts of documents [n_docs + 1] int32
Batch = tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int32]]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Leaves with a line about what is wrong in it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def number(name: str, default: float, text: str) -> None:
        p.add_argument(name, type=type(default), default=default, help=f"{text} (default: {default})")

    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the checkpoint, tokenizer and log; a run that is unfinished there goes on",
    )
    p.add_argument(
        "--init", type=Path, help="folder of another run, whose weights and tokenizer to begin with"
    )
    number("--steps", 7000, "of the whole run, which the learning rate follows")
    p.add_argument("--until", type=int, help="stop after this step, to go on another time")
    p.add_argument("--limit", type=float, default=math.inf, help="seconds after which to stop likewise")
    number("--tokens", 131072, "in a step")
    number("--lr", 1.5e-3, "highest learning rate")
    number("--warmup", 200, "steps up to it")
    number("--decay", 0.1, "weight decay of matrices")
    number("--seed", 1, f"of weights and problems, below {SEEDS}")
    number("--workers", max(1, (os.cpu_count() or 2) - 2), "processes that make problems; 0 makes them here")
    p.add_argument(
        "--gym", type=Path, help="JSON of reasoning-gym entries, for a machine without it; made where absent"
    )
    number("--gym-entries", 60000, "of each kind, where --gym makes them")
    p.add_argument(
        "--short",
        default="0.08:1536,0.2:2560",
        help="until which share of the run documents are at most how long (default: %(default)s)",
    )
    p.add_argument(
        "--cut",
        default="0.3:0.8",
        help="until which share of the run which share of chains ends when in order (default: %(default)s)",
    )
    p.add_argument(
        "--no-hints", action="store_true", help="traces without 'After NAME:' where facts are put in order"
    )
    number("--tokenizer-problems", 4000, "that a tokenizer is trained on where there is none")
    p.add_argument(
        "--attention",
        choices=("varlen", "flex", "one"),
        default="varlen",
        help="how documents are kept apart on a GPU (default: varlen)",
    )
    p.add_argument("--no-compile", action="store_true", help="do not compile the model on a GPU")
    for name, value in Config().as_dict().items():
        number("--" + name.replace("_", "-"), value, "of the model")
    a = p.parse_args(argv)
    if not 0 <= a.seed < SEEDS:
        p.error(f"--seed {a.seed} is not from 0 to {SEEDS - 1}")
    if not 1 <= a.steps <= STEPS:
        p.error(f"--steps {a.steps} is not from 1 to {STEPS}")
    for name in ("tokens", "lr", "n_layer", "n_embd", "n_head", "n_head_kv", "n_embd_head", "n_ff", "n_ctx"):
        if getattr(a, name) <= 0:
            p.error(f"--{name.replace('_', '-')} {getattr(a, name)} is not above 0")
    for name in ("short", "cut"):
        try:
            scheduled(0.0, getattr(a, name), 0.0)
        except ValueError:
            p.error(f"--{name} {getattr(a, name)!r} is not of the form SHARE:VALUE,SHARE:VALUE")
    return a


def scheduled(share: float, schedule: str, then: float) -> float:
    """The value at a share of the run of "until:value,until:value"; `then` behind the last.

    Raises:
        ValueError: the schedule is of another form.
    """
    pairs = [tuple(map(float, part.split(":"))) for part in filter(None, schedule.split(","))]
    return next((value for until, value in pairs if share < until), then)


def batch(step: int, a: argparse.Namespace, tokenizer: Any, gym: dict[str, Any] | None) -> Batch:
    """The documents of a step, one after the other; the last is cut off. The same for a seed and step."""
    corpus = Corpus(tokenizer, a.seed, a.n_ctx, gym, not a.no_hints, step)
    tokens = np.zeros(a.tokens, np.int16)
    target = np.full(a.tokens, -1, np.int16)
    starts = [0]
    share = step / a.steps
    longest = min(a.n_ctx, int(scheduled(share, a.short, a.n_ctx)))
    documents = corpus.documents(longest, scheduled(share, a.cut, 0.0))
    while starts[-1] < a.tokens:
        at = starts[-1]
        ids, learned = (x[: a.tokens - at] for x in next(documents))
        end = at + len(ids)
        tokens[at:end] = ids
        target[at : end - 1] = np.where(learned[1:], ids[1:], -1)
        starts.append(end)
    return tokens, target, np.array(starts, np.int32)


def produce(
    queue: Any, first: int, a: argparse.Namespace, tokenizer: str, gym: dict[str, Any] | None
) -> None:
    """Put the batches of steps first, first + workers, .. into a queue."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tok = Tokenizer.from_str(tokenizer)
    for step in range(first, a.steps, a.workers):
        queue.put(batch(step, a, tok, gym))


def batches(
    a: argparse.Namespace, tokenizer: str, gym: dict[str, Any] | None, done: int
) -> Generator[Batch, None, None]:
    """Batches of the steps from `done` on, made by other processes, or by this one where a.workers is 0."""
    if a.workers == 0:
        from tokenizers import Tokenizer

        tok = Tokenizer.from_str(tokenizer)
        for step in range(done, a.steps):
            yield batch(step, a, tok, gym)
        return
    context = mp.get_context("spawn")
    queues = [context.Queue(4) for _ in range(a.workers)]
    team = [
        context.Process(target=produce, args=(queue, done + i, a, tokenizer, gym), daemon=True)
        for i, queue in enumerate(queues)
    ]
    for process in team:
        process.start()
    try:
        for step in range(done, a.steps):
            yield queues[(step - done) % a.workers].get(timeout=300)
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
    """Mean cross-entropy of what is learned, 0 where nothing is; tokens, target, pos [n]."""
    logits = model.logits(model(tokens, pos, attend, where))
    total = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
    return total / (target >= 0).sum().clamp(min=1)


def attention(starts: NDArray[np.int32], a: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """How documents [starts[i], starts[i + 1]) attend each to itself: a function of model.py, and `where`."""
    if device == "cpu" or a.attention == "one":
        return one_by_one, starts.tolist()
    if a.attention == "varlen":
        edges = np.full(max(MAX_DOCS, len(starts)), starts[-1], np.int32)
        edges[: len(starts)] = starts
        return packed, (torch.from_numpy(edges).to(device), a.n_ctx)
    document = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return masked, block_mask(torch.from_numpy(document).to(device))


def training_entries(a: argparse.Namespace) -> dict[str, Any] | None:
    """The entries in the file --gym, made where it does not exist; None without the option."""
    if a.gym is None:
        return None
    if not a.gym.exists():
        a.gym.write_text(json.dumps(gym_entries(a.gym_entries)), encoding="utf-8")
    entries: dict[str, Any] = json.loads(a.gym.read_text(encoding="utf-8"))
    return entries


def tokenizer_of(a: argparse.Namespace, gym: dict[str, Any] | None) -> str:
    """tokenizer.json in a.out; where there is none, that of --init, or a new one."""
    path: Path = a.out / "tokenizer.json"
    if not path.exists():
        if a.init:
            path.write_text((a.init / path.name).read_text(encoding="utf-8"), encoding="utf-8")
        else:
            train_tokenizer(a.n_vocab, sample_texts(a.tokenizer_problems, gym)).save(str(path))
    return path.read_text(encoding="utf-8")


class Run:
    """A model in training: weights, optimizer, log, and where they are saved. Goes on where a.out has a run.

    Leaves with one line if what is saved is of another model.
    """

    def __init__(self, a: argparse.Namespace, device: str) -> None:
        self.a, self.device = a, device
        self.config = {name: getattr(a, name) for name in Config().as_dict()}
        self.model = Reasoner(Config(**self.config)).to(device)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": a.decay}, {"params": others, "weight_decay": 0.0}],
            lr=a.lr,
            betas=(0.9, 0.95),
            fused=device == "cuda",
        )
        self.done, self.log = 0, []
        self.checkpoint: Path = a.out / "checkpoint.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=device, weights_only=True)
            if state["config"] != self.config:
                sys.exit(f"{self.checkpoint} is of a model with other sizes: give them, or another --out")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done, self.log = state["step"], state["log"]
        elif a.init:
            weights = torch.load(a.init / "model.pt", map_location=device, weights_only=True)
            try:
                self.model.load_state_dict({k: v.float() for k, v in weights.items()})
            except RuntimeError:
                sys.exit(f"{a.init / 'model.pt'} is of a model with other sizes: give them")

    def save(self) -> None:
        """Write checkpoint.pt to go on from, model.pt in half precision, train.json with settings and log."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.done, "log": self.log, "config": self.config}
        unfinished = self.checkpoint.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)
        halves = {k: v.half() for k, v in self.model.state_dict().items()}
        torch.save(halves, self.a.out / "model.pt")
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.a).items()}
        about = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "config": self.config,
            "steps": self.done,
            "of": self.a.steps,
            "tokens_per_step": self.a.tokens,
            "seed": self.a.seed,
            "lr": self.a.lr,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "arguments": {k: v for k, v in given.items() if k not in self.config and v != math.inf},
            "log": self.log,
        }
        (self.a.out / "train.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def step(self, loss_fn: Any, made: Batch) -> Tensor:
        """Learn from a batch; its loss."""
        tokens, target, starts = made
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.a)
        x = torch.from_numpy(tokens).to(self.device, non_blocking=True).int()
        y = torch.from_numpy(target).to(self.device, non_blocking=True).long()
        first = np.repeat(starts[:-1], np.diff(starts))  # of each token's document
        pos = torch.from_numpy(np.arange(len(tokens)) - first).to(self.device, non_blocking=True)
        attend, where = attention(starts, self.a, self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss: Tensor = loss_fn(self.model, x, y, pos, attend, where)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()


def main(argv: list[str] | None = None) -> None:
    """Train, or go on training."""
    begun = time.time()
    a = arguments(argv)
    if a.init:
        for name in ("model.pt", "tokenizer.json"):
            if not (a.init / name).is_file():
                sys.exit(f"--init {a.init}: there is no {name} in it")
    a.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    gym = training_entries(a)
    tokenizer = tokenizer_of(a, gym)
    run = Run(a, device)
    end = min(a.steps, a.until or a.steps)
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{size:.2f} M parameters on {device}, from step {run.done} of {a.steps}", flush=True)

    loss_fn = loss_of if a.no_compile or device == "cpu" else torch.compile(loss_of, dynamic=False)
    since, at = time.time(), run.done
    losses: list[Tensor] = []
    made = batches(a, tokenizer, gym, run.done)
    first = run.done + 1
    while run.done < end and time.time() - begun < a.limit:
        losses.append(run.step(loss_fn, next(made)))
        if run.done in (first, end) or run.done % LOG_EVERY == 0:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            now = time.time()
            rate = (run.done - at) * a.tokens / (now - since)
            since, at = now, run.done
            lr = learning_rate(run.done - 1, a)
            entry = {"step": run.done, "loss": round(mean, 5), "tokens_per_s": round(rate), "lr": lr}
            run.log.append({**entry, "seconds": round(now - begun, 1)})
            print(f"step {run.done} loss {mean:.4f} {rate / 1e3:.0f}k tok/s {now - begun:.0f} s", flush=True)
        if run.done % SAVE_EVERY == 0:
            run.save()
    made.close()
    run.save()
    print(
        "finished" if run.done >= a.steps else "to be continued", f"{time.time() - begun:.0f} s", flush=True
    )


if __name__ == "__main__":
    main()
