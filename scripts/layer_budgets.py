"""Are calibrated layer budgets better than uniform ones? KL divergence from the full cache on long text.

Teacher-forced on Python's documentation, fed in chunks of 64; the mean over the tokens after the first
compaction.

    rkv-local calibrate MODEL.gguf -o calibration.json
    python scripts/layer_budgets.py MODEL.gguf calibration.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pydoc_data.topics import topics  # part of the standard library
from typing import Any

import numpy as np

from rkv_local import KVBudget, Llama, Session

TEXTS = {"sequences": ("typesseq",), "execution": ("execmodel", "formatstrings"), "names": ("specialnames",)}
CHUNK, BUFFER = 64, 128


def log_probabilities(path: str, kv: KVBudget | None, texts: Sequence[list[int]], threads: int) -> list[Any]:
    """For each text float32 [n_tokens, n_vocab]."""
    with Llama(path, kv=kv, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False) as llama:
        session = Session(llama)
        found = []
        for text in texts:
            session.clear()
            parts = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
            logits = np.concatenate([session.decode({0: part}, logits="all")[0] for part in parts])
            logits -= logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        session.close()
        return found


def main() -> None:
    """Print a Markdown table: KL divergence and top-1 agreement, uniform → calibrated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--budgets", default="256,512")
    parser.add_argument("--policies", default="rkv,snapkv,latest,streaming")
    parser.add_argument("--tokens", type=int, default=1300, help="of each text")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with Llama(options.model, kv=None, verbose=False) as llama:
        texts = [
            llama.tokenize("\n\n".join(topics[name] for name in names).encode()) for names in TEXTS.values()
        ]
    texts = [text[: options.tokens] for text in texts]
    full = log_probabilities(options.model, None, texts, options.threads)
    print(f"| policy | budget | {' | '.join(TEXTS)} |\n|---|---:|{'---:|' * len(TEXTS)}")
    for policy in options.policies.split(","):
        for budget in map(int, options.budgets.split(",")):
            cells = [""] * len(texts)
            for schedule in ("uniform", options.calibration):
                kv = KVBudget(budget, BUFFER, policy=policy, batch=CHUNK, layer_budgets=schedule)
                for i, found in enumerate(log_probabilities(options.model, kv, texts, options.threads)):
                    p, q = full[i][budget + BUFFER :], found[budget + BUFFER :]
                    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
                    same = float((p.argmax(axis=1) == q.argmax(axis=1)).mean())
                    cells[i] += f"{' → ' if cells[i] else ''}{kl:.3f} ({same:.1%})"
            print(f"| {policy} | {budget} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
