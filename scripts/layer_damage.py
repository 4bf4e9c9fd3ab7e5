"""Which layers of a model cannot do with few cells? Each is tried by itself, and budgets by layer follow.

The model answers questions with a full cache. Its traces are read again, once for each layer and size: that
layer has few cells, all others keep everything. How far the next token's distribution moves is the layer's
damage. Then cells go where they lessen damage most, and the shares are written as a calibration.

    python scripts/layer_damage.py MODEL.gguf --prompts questions.txt -o MODEL.rkv.json
    rkv-local run MODEL.gguf "..." --kv-policy latest --kv-budget 512 --kv-layer-budgets MODEL.rkv.json

Time: reading all traces once for each layer, and three times more for each layer that suffers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rkv_local import KVBudget, _native
from rkv_local.budget import POLICIES
from rkv_local.calibrate import QUESTIONS
from rkv_local.calibration import Calibration
from rkv_local.cli import nativelog, ui
from rkv_local.evals.decode import Batcher, Request
from rkv_local.evals.divergence import log_softmax
from rkv_local.evals.model import Context, Model, Setting
from rkv_local.models import resolve

if TYPE_CHECKING:
    from numpy.typing import NDArray

Floats = npt.NDArray[np.float64]
FACTORS = (0.5, 1.0, 2.0, 4.0)  # sizes that are tried, in budgets
SMALL = 0.05  # layers below this share of the largest damage are not tried with more cells
_TOP = 256  # likeliest tokens that are told apart; the others are taken together


class _Judge:
    """The full cache's distributions over a trace, and how far others are from them."""

    def __init__(self) -> None:
        self._top: list[NDArray[np.intp]] = []
        self._log: list[NDArray[np.float32]] = []

    def learn(self, logits: NDArray[np.float32]) -> None:
        """logits: float32 [n, n_vocab] of the next positions."""
        p = log_softmax(logits)
        n = min(_TOP, p.shape[1] - 1)
        top = np.argpartition(-p, n, axis=1)[:, :n]
        self._top.append(top)
        self._log.append(self._coarse(p, top))

    def distance(self, chunk: int, logits: NDArray[np.float32]) -> Floats:
        """KL divergence in nats, float64 [n], of a chunk's positions; a lower bound, nearly tight."""
        p, q = self._log[chunk], self._coarse(log_softmax(logits), self._top[chunk])
        kl: Floats = (np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64)
        return np.maximum(kl, 0)

    @staticmethod
    def _coarse(p: NDArray[np.float32], top: NDArray[np.intp]) -> NDArray[np.float32]:
        chosen = np.take_along_axis(p, top, axis=1)
        rest = np.log(np.maximum(1 - np.exp(chosen).sum(axis=1, keepdims=True), 1e-7))
        return np.concatenate([chosen, rest.astype(np.float32)], axis=1)


def measure(
    model: Model,
    kv: KVBudget,
    traces: Sequence[Sequence[int]],
    layers: Sequence[int],
    setting: Setting | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], Floats]:
    """The damage of each layer under several sizes.

    Args:
        kv: policy and parameters; its budget times FACTORS are the sizes, as far as traces are longer.
        traces: tokens. layers: which have cells under the budget.
        setting: threads and so on. progress: called with the tokens read and (about) in all.

    Returns:
        (sizes in cells, float64 [len(layers), len(sizes)]: mean KL divergence from the full cache in nats,
        over all positions behind the first compaction with the smallest size). NaN where it was not measured,
        since the layer's damage is small.

    Raises:
        ValueError: the traces are too short. RKVError, RuntimeError: the engine refuses.
    """
    longest = max(map(len, traces))
    sizes = [round(f * kv.budget) for f in FACTORS]
    sizes = [s for s in sizes if kv.least_budget <= s and s + 2 * kv.buffer <= longest]
    if not sizes:
        raise ValueError(f"traces of {longest:,} tokens are too short for a budget of {kv.budget:,}")
    first = sizes[0] + kv.buffer
    n_tokens = sum(map(len, traces))
    least = n_tokens * (1 + len(layers))
    done = 0

    def told(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, max(done, least))

    def run(budgets: list[int], look: Callable[[int, int, NDArray[np.float32]], None]) -> None:
        """Read all traces; look(trace, chunk, logits [n, n_vocab])."""
        made = replace(kv, budget=longest, layer_budgets=tuple(budgets), batch=kv.buffer)
        with Context(
            model,
            replace(setting or Setting(), kv=made, n_ctx=longest, n_seq=1, n_outputs=kv.buffer),
        ) as context:
            for t, trace in enumerate(traces):
                context.clear(0)
                tokens = np.asarray(trace, np.int32)
                for chunk, start in enumerate(range(0, len(tokens), kv.buffer)):
                    part = tokens[start : start + kv.buffer]
                    context.feed(0, part, start, outputs=True)
                    look(t, chunk, context.logits(len(part)))
                    told(len(part))

    judges = [_Judge() for _ in traces]
    run([longest] * model.n_layer, lambda t, _, logits: judges[t].learn(logits))
    found = np.full((len(layers), len(sizes)), np.nan)

    def one(row: int, column: int) -> None:
        budgets = [longest] * model.n_layer
        budgets[layers[row]] = sizes[column]
        total: list[float] = [0.0, 0.0]

        def look(t: int, chunk: int, logits: NDArray[np.float32]) -> None:
            late = judges[t].distance(chunk, logits)[max(0, first - chunk * kv.buffer) :]
            total[0] += float(late.sum())
            total[1] += len(late)

        run(budgets, look)
        found[row, column] = total[0] / max(total[1], 1)

    for row in range(len(layers)):
        one(row, 0)
    large = [row for row in range(len(layers)) if found[row, 0] >= SMALL * found[:, 0].max()]
    least += n_tokens * len(large) * (len(sizes) - 1)
    for row in large:
        for column in range(1, len(sizes)):
            one(row, column)
    return sizes, found


def allocate(sizes: Sequence[int], damage: Floats, total: int) -> list[int]:
    """Cells of each layer, so that the damages add up to the least, if they do add up.

    Between two sizes damage is taken to be linear, above the last one constant; each layer's curve is made
    convex first. Every layer has sizes[0]; then cells go where they help most.

    Args:
        sizes: ascending. damage: float64 [n, len(sizes)]; NaN is the same as the size before.
        total: cells of all layers; at least n * sizes[0].
    """
    n = len(damage)
    cells = [sizes[0]] * n
    pieces: list[tuple[float, int, int]] = []  # (damage less per cell, layer, cells)
    for layer in range(n):
        curve = [float(damage[layer, 0])]
        for value in damage[layer, 1:]:
            curve.append(curve[-1] if np.isnan(value) else min(curve[-1], float(value)))
        at = 0
        while at < len(sizes) - 1:  # the lower convex hull: the steepest way on, again and again
            slopes = [(curve[at] - curve[j]) / (sizes[j] - sizes[at]) for j in range(at + 1, len(sizes))]
            best = int(np.argmax(slopes))
            pieces.append((slopes[best], layer, sizes[at + 1 + best] - sizes[at]))
            at += 1 + best
    left = total - sum(cells)
    for slope, layer, room in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        if slope <= 0:
            break
        got = min(room, left)
        cells[layer] += got
        left -= got
    for layer in range(n):  # what helps nowhere is dealt out evenly
        cells[layer] += left // n + (layer < left % n)
    return cells


def shares_of(cells: Sequence[int], least: int) -> tuple[float, ...]:
    """What calibration.share_out() turns back into these cells."""
    spare = [c - least for c in cells]
    return tuple(s / sum(spare) for s in spare)


def traces_of(
    model: Model, questions: Sequence[str], longest: int, threads: int, seed: int
) -> list[list[int]]:
    """Answers with a full cache at temperature 0.8, prompts included, each at most `longest` tokens."""
    prompts = [model.prompt(question) for question in questions]
    n_ctx = max(map(len, prompts)) + longest
    with Context(model, Setting(n_ctx=n_ctx, n_seq=min(8, len(prompts)), threads=threads)) as context:
        batcher = Batcher(context, longest, temp=0.8, seed=seed)
        requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
        answers = {int(done.id): done.tokens for done in batcher.run(requests)}
    return [[*prompt.tolist(), *answers[i].tolist()][:longest] for i, prompt in enumerate(prompts)]


def main() -> None:
    """Write the calibration, print a table of damages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a GGUF file or a short name")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the calibration, a .json file")
    parser.add_argument("--prompts", type=Path, help="questions, one per line, instead of ours")
    parser.add_argument("--budget", type=int, default=512)
    policies = [name for name in POLICIES if name not in ("none", "given")]
    parser.add_argument("--policy", default="latest", choices=policies)
    parser.add_argument("--length", type=int, default=2560, help="most tokens of a trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-ngl", "--gpu-layers", type=int, default=0)
    a = parser.parse_args()
    try:
        kv = KVBudget(a.budget, policy=a.policy)
        if kv.budget == kv.least_budget:
            raise ValueError(f"budget is {kv.budget}, must be larger: no layer could have less than another")
        path = resolve(a.model).path
        lines = a.prompts.read_text().splitlines() if a.prompts else QUESTIONS
        questions = [line.strip() for line in lines if line.strip()]
        if not questions:
            raise ValueError(f"there are no prompts in {a.prompts}")
        nativelog.install(False)
        state = (0.0, "answering")
        with ui.progress("layers", lambda: state), Model(path, a.gpu_layers) as model:
            traces = traces_of(model, questions, a.length, a.threads, a.seed)
            with Context(model, Setting(kv=kv, n_ctx=a.length, threads=a.threads)) as context:
                layers = list(_native.governed_layers(context.raw))

            def read(done: int, total: int) -> None:
                nonlocal state
                state = (done / total, f"{done:,}/{total:,} tokens")

            sizes, damage = measure(model, kv, traces, layers, Setting(threads=a.threads), read)
        cells = allocate(sizes, damage, a.budget * len(layers))
        shares: list[float | None] = [None] * model.n_layer
        for layer, share in zip(layers, shares_of(cells, kv.least_budget), strict=True):
            shares[layer] = share
        compactions = sum((len(t) - s) // kv.buffer for t in traces for s in sizes if len(t) > s)
        Calibration.of(path, kv, shares, sum(map(len, traces)), compactions).save(a.output)
    except (ValueError, OSError, RuntimeError) as err:
        sys.exit(f"error: {err}")
    head = ["layer", *(f"nats at {s}" for s in sizes), f"cells of {a.budget}"]
    rows = [
        [str(layer), *("-" if np.isnan(x) else f"{x:.5f}" for x in row), str(n)]
        for layer, row, n in zip(layers, damage, cells, strict=True)
    ]
    print(ui.markdown_table(head, rows, [True] * len(head)))


if __name__ == "__main__":
    main()
