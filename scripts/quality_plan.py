"""What docs/quality.md is to measure: stages, and the jobs of each in order of importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rkv_local.budget import POLICIES, KVBudget
from rkv_local.evals.problems import KINDS
from rkv_local.evals.verdict import PUBLISHED, candidate

PERCENT = (25, 16, 10, 34)  # of the mean trace, those of the aims first
EDGES = (5, 54)
CELLS = (256, 512, 1024, 2048)
REASONER, LONG = "models/rkv-reasoner.gguf", "smollm2"
TRACE = 2200  # tokens of a trace where the full cache has not been measured, about

OURS = candidate()
MAIN = (OURS, PUBLISHED)
OUR_BUFFER = (("buffer", KVBudget(policy=OURS).buffer),)
OTHERS = tuple(p for p in POLICIES if p not in (*MAIN, "none", "given"))

# One setting at a time. Some are of one policy alone.
ABLATIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("lam", (0.0, 0.01, 0.5, 1.0)),
    ("window", (4, 16, 32)),
    ("buffer", (32, 64, 128)),  # R-KV with ours: buffers()
    ("pool", (1, 3, 15)),
    ("pin", (0, "prompt")),
    ("memory", (0.9,)),
)
OWN_ABLATIONS: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "rkv": (("threshold", (0.3, 0.7)), ("reference", (True,))),
    "latest": (
        ("recent", (8, 48, 192)),
        ("n_sim", (1, 4)),
        ("value_weight", (0.0, 0.25, 1.0)),
        ("layer_budgets", ("pyramid",)),
    ),
}


@dataclass(frozen=True)
class Job:
    """A configuration, or several that read one text side by side.

    task: dense, sparse, needles or kl. policy None: the full cache. percent: of the mean trace. cells:
    budgets of needles and kl. calibrated: budgets by layer from a calibration. fields: of KVBudget. split: of
    the problems; shares are of the mean trace of the final ones all the same.
    """

    stage: str
    task: str
    policy: str | None = None
    percent: float | None = None
    cells: tuple[int, ...] = ()
    cache: str = "f16"
    calibrated: bool = False
    fields: tuple[tuple[str, Any], ...] = ()
    split: str = "final"

    @property
    def model(self) -> str:
        """Which model it is about."""
        return REASONER if self.task in KINDS else LONG

    def __str__(self) -> str:
        words = [self.task, self.policy or "full cache"]
        words += [self.split] if self.split != "final" else []
        words += [f"{self.percent:g} %"] if self.percent else []
        words += [", ".join(f"{n:,}" for n in self.cells)] if self.cells else []
        words += [self.cache] if self.cache != "f16" else []
        words += ["calibrated"] if self.calibrated else []
        return " ".join(words + [f"{name}={value}" for name, value in self.fields])

    def tokens(self, n_problems: int, needles: tuple[int, int, int], kl: tuple[int, int]) -> int:
        """How many are read or generated, about. needles: texts, tokens, facts in each; kl: texts, tokens."""
        if self.task in KINDS:
            return n_problems * TRACE
        if self.task == "needles":
            texts, length, facts = needles
            return texts * (length + 60 * facts) * max(1, len(self.cells))
        return kl[0] * kl[1] * (1 + len(self.cells))


def jobs_of(stage: str) -> Iterator[Job]:
    """The jobs of a stage, the most important ones first."""
    made = STAGES[stage][1]()
    return (replace(job, stage=stage) for job in made)


def grid(policies: Sequence[str], percents: Sequence[int], **more: Any) -> Iterator[Job]:
    """All of these, budget by budget."""
    for percent in percents:
        for kind in KINDS:
            for policy in policies:
                yield Job("", kind, policy, percent, **more)


def full() -> Iterator[Job]:
    """Budgets are shares of what this says."""
    yield from (Job("", kind) for kind in KINDS)


def fresh() -> Iterator[Job]:
    """Other problems, for a default that was changed after the final ones had been asked."""
    yield from (replace(job, split="fresh") for job in (*full(), *grid(MAIN, PERCENT), *buffers()))


def buffers() -> Iterator[Job]:
    """R-KV with the buffer that is our policy's default."""
    return grid((PUBLISHED,), PERCENT, fields=OUR_BUFFER)


def ablations() -> Iterator[Job]:
    """One setting changed at a time, 16 %, our policy and dense problems first."""
    for percent in (16, 25):
        for policy in MAIN:
            for kind in KINDS:
                for name, values in ABLATIONS + OWN_ABLATIONS.get(policy, ()):
                    for value in values:
                        usual = getattr(KVBudget(policy=policy), name)
                        if value != usual:
                            yield Job("", kind, policy, percent, fields=((name, value),))


def quantised() -> Iterator[Job]:
    """The cache as q8_0: full, then the two main policies."""
    yield from (Job("", kind, cache="q8_0") for kind in KINDS)
    yield from grid(MAIN, PERCENT, cache="q8_0")


def layers() -> Iterator[Job]:
    """Ours without budgets by layer, R-KV with them."""
    for percent in PERCENT:
        for kind in KINDS:
            yield Job("", kind, PUBLISHED, percent, calibrated=True)
            yield Job("", kind, PUBLISHED, percent, calibrated=True, fields=OUR_BUFFER)
            yield Job("", kind, OURS, percent, fields=(("layer_budgets", "uniform"),))


def calibrated() -> Iterator[Job]:
    """Every other policy with budgets by layer, as ours has them."""
    return grid(OTHERS, PERCENT[:2], calibrated=True)


def divergences() -> Iterator[Job]:
    """Over a long text: all policies, R-KV with our buffer too, the main ones with calibrated budgets."""
    for policy in (*MAIN, *OTHERS):  # for this model a calibration lies elsewhere than beside it
        yield Job("", "kl", policy, cells=CELLS, fields=(("layer_budgets", "uniform"),) * (policy == OURS))
    yield Job("", "kl", PUBLISHED, cells=CELLS, fields=OUR_BUFFER)
    yield from (Job("", "kl", policy, cells=CELLS, calibrated=True) for policy in MAIN)


def needles() -> Iterator[Job]:
    """Facts found in a long text; the full cache says what the model could find at all."""
    yield Job("", "needles")
    yield from (Job("", "needles", policy, cells=CELLS) for policy in (*MAIN, *OTHERS))


STAGES = {
    "full": ("the reasoner with a full cache", full),
    "core": (f"{OURS} and {PUBLISHED} at 25, 16, 10 and 34 %", lambda: grid(MAIN, PERCENT)),
    "fresh": ("the same, R-KV with our buffer, and the full cache on problems that were never asked", fresh),
    "shared": (
        "the same with one index set for all heads and layers",
        lambda: grid(MAIN, PERCENT, fields=(("shared_heads", True),)),
    ),
    "buffers": ("R-KV with our policy's buffer", buffers),
    "layers": ("budgets by layer: R-KV with them, our policy without", layers),
    "calibrated": ("every other policy with budgets by layer, at 25 and 16 %", calibrated),
    "policies": ("every other policy at 25 and 16 %", lambda: grid(OTHERS, PERCENT[:2])),
    "edges": ("the main policies at 5 and 54 %", lambda: grid(MAIN, EDGES)),
    "q8_0": ("a cache of q8_0: full, and the two main policies", quantised),
    "more-policies": (
        "every other policy at 10, 34, 5 and 54 %",
        lambda: grid(OTHERS, (*PERCENT[2:], *EDGES)),
    ),
    "ablations": ("one setting changed at a time, at 16 and 25 %", ablations),
    "kl": ("distance from the full cache over a long text", divergences),
    "needles": ("facts planted in a long text", needles),
    "q8_0-policies": (
        "a cache of q8_0: every other policy",
        lambda: (*grid(MAIN, EDGES, cache="q8_0"), *grid(OTHERS, (*PERCENT, *EDGES), cache="q8_0")),
    ),
}
