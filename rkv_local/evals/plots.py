"""Plots of results, as SVG files. matplotlib is an extra."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .report import Plots
from .summary import Row, Section, column, sections
from .tables import main_variants, title

__all__ = ["available", "draw", "paths"]


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(rows: Sequence[Row], folder: Path, page: Path | None = None) -> Plots:
    """Write plots of every section; by section title what they show and their paths, relative to the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    # the same file for the same data, and text that stays text
    matplotlib.rcParams.update({"svg.hashsalt": "rkv-local", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    for section, name, _, make in figures(rows):
        save(make(section), folder / name)
    return paths(rows, folder, page)


def paths(rows: Sequence[Row], folder: Path, page: Path | None = None) -> Plots:
    """What draw() tells, without drawing."""
    found: Plots = {}
    start = page.parent if page else Path()
    for section, name, what, _ in figures(rows):
        path = Path(os.path.relpath(folder / name, start)).as_posix()
        found.setdefault(title(section), []).append((what, path))
    return found


def figures(rows: Sequence[Row]) -> Iterator[tuple[Section, str, str, Any]]:
    """(section, file name, what it shows, what draws it) of every plot."""
    for section in sections(rows):
        if not section.columns:
            continue
        words = [
            section.kind,
            str(section.task.get("kind", "")),
            hashlib.sha256(title(section).encode()).hexdigest()[:6],
        ]
        for what, suffix, make in kinds(section):
            yield section, f"{'-'.join(filter(None, words))}-{suffix}.svg", what, make


def kinds(section: Section) -> list[tuple[str, str, Any]]:
    """What is drawn of a section."""
    if section.kind == "kl":
        return [("KL divergence against budget", "kl", lambda s: lines(s, "kl", "KL divergence, nats"))]
    made: list[tuple[str, str, Any]] = [
        ("Right answers against budget", "accuracy", lambda s: lines(s, "accuracy", "right answers"))
    ]
    if section.kind == "needles":
        made.append(("Needles found, by depth and budget", "heat", heat))
    else:
        made.append(
            ("Trace length against budget", "tokens", lambda s: lines(s, "mean_tokens", "mean tokens"))
        )
    return made


def save(figure: Any, path: Path) -> None:
    """As SVG without a date in it."""
    from matplotlib import pyplot

    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def lines(section: Section, value: str, label: str) -> Any:
    """A value against the budget, a line for each variant; with intervals where there are some."""
    import matplotlib
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    ends = {"accuracy": ("low", "high"), "kl": ("kl_low", "kl_high")}.get(value)
    percent = all(r.get("budget_percent") for r in section.of_types() if r["kv"] is not None)
    names = main_variants(section)
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    for i, name in enumerate(names):
        rows = [r for c in section.columns if (r := section.find(name, c))]
        x = [r["budget_percent"] if percent else r["budget"] for r in rows]
        y = [r[value] for r in rows]
        bars = None
        if ends:
            bars = [[abs(v - r[end]) for v, r in zip(y, rows, strict=True)] for end in ends]
        axes.errorbar(
            x,
            y,
            bars,
            label=name,
            color=colors(i % 20),
            marker="os^vD<>ph*"[i % 10],
            markersize=4,
            capsize=2,
            linewidth=1,
        )
    full = section.full
    if full is not None and value != "kl":
        axes.axhline(full[value], color="black", linestyle=":", linewidth=1, label="full cache")
    axes.set_xlabel("budget, % of the mean trace" if percent else "budget, cells")
    axes.set_ylabel(label)
    if value == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(names) > 6:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(fontsize=7, ncols=2)
    return figure


def heat(section: Section) -> Any:
    """Needles found: depth down, budget across, a panel for each variant."""
    import numpy as np
    from matplotlib import pyplot

    names = main_variants(section)
    full = section.full
    shown = [r for r in section.rows if "depths" in r]
    depths = sorted({d for r in shown for d in r["depths"]})
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(1.2 + 1.9 * len(names), 3.2), squeeze=False, sharey=True
    )
    image = None
    for axes, name in zip(panels[0], names, strict=True):
        rows = [r for c in section.columns if (r := section.find(name, c))] + ([full] if full else [])
        grid = np.array(
            [
                [r["depths"][d][0] / r["depths"][d][1] if d in r["depths"] else np.nan for r in rows]
                for d in depths
            ]
        )
        image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_title(name, fontsize=8)
        labels = ["full" if column(r)[0] == 2 else f"{r['budget']}" for r in rows]
        axes.set_xticks(range(len(rows)), labels, fontsize=7, rotation=45)
        axes.set_yticks(range(len(depths)), [f"{100 * float(d):.0f} %" for d in depths], fontsize=7)
    panels[0][0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels[0]), label="found")
    return figure
