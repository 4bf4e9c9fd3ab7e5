"""A model's calibrated layer budgets: the file beside it, and what follows from it. calibrate.py measures."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import KVBudget

FORMAT, FORMAT_VERSION = "rkv-local calibration", 2
_HEAD, _CHUNK, _CHUNKS = 4 << 20, 1 << 16, 64  # bytes of a model that its fingerprint is made of

Curve = tuple[float | None, ...]


@dataclass(frozen=True)
class Calibration:
    """What it does to a model if one of its layers has few cells, and all others keep everything.

    Args:
        model: its file's name; bytes, fingerprint: which file that was.
        policy: that chose the cells; settings: the KVBudget's other fields then. It serves any policy.
        sizes: cells that were tried, ascending.
        damage: for each layer and size the KL divergence of the next token's distribution from the full
            cache's, the mean in nats; None: not tried, since fewer cells did hardly any damage. None instead
            of a list: a layer without cells under the budget.
        tokens: of the traces that were read.
        rkv_local: the version that made it.
    """

    model: str
    bytes: int
    fingerprint: str
    policy: str
    settings: dict[str, Any]
    sizes: tuple[int, ...]
    damage: tuple[Curve | None, ...]
    tokens: int
    rkv_local: str

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        kv: KVBudget,
        sizes: Sequence[int],
        damage: Sequence[Sequence[float | None] | None],
        tokens: int,
    ) -> Calibration:
        """What was measured with `kv` for a model's file. Raises ValueError if the file cannot be read."""
        from . import __version__

        size, digest = fingerprint(model)
        unused = ("policy", "budget", "layer_budgets", "batch")
        return cls(
            model=Path(model).name.encode("utf-8", "backslashreplace").decode(),
            bytes=size,
            fingerprint=digest,
            policy=kv.policy,
            settings={name: value for name, value in asdict(kv).items() if name not in unused},
            sizes=tuple(sizes),
            damage=tuple(None if curve is None else tuple(curve) for curve in damage),
            tokens=tokens,
            rkv_local=__version__,
        )

    def save(self, path: Path) -> None:
        """Write it, all or nothing. Raises OSError."""
        text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}, indent=1)
        handle, name = tempfile.mkstemp(prefix=path.name, suffix=".new", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, model: str | os.PathLike[str] | None = None) -> Calibration:
        """Read a file, and check that it belongs to a model's.

        Raises:
            ValueError: one line; it is missing, damaged, of another version or of another model.
        """
        again = "rkv-local calibrate makes it anew"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"there is no calibration at {path}: rkv-local calibrate makes it") from None
        except OSError as error:
            raise ValueError(f"cannot read the calibration {path}: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"the calibration {path} is damaged: it is not JSON; {again}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{path} is no calibration: its format is not {FORMAT!r}")
        if found.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"the calibration {path} has version {found.get('version')!r}, not {FORMAT_VERSION}; {again}"
            )
        del found["format"], found["version"]
        wrong = _wrong(found)
        if wrong:
            raise ValueError(f"the calibration {path} is damaged: {wrong}; {again}")
        damage = tuple(None if curve is None else tuple(curve) for curve in found["damage"])
        made = cls(**{**found, "sizes": tuple(found["sizes"]), "damage": damage})
        if model is not None and (made.bytes, made.fingerprint) != fingerprint(model):
            raise ValueError(
                f"the calibration {path} belongs to another model, {made.model} of {made.bytes:,} bytes; "
                f"{again}"
            )
        return made


def allocate(
    sizes: Sequence[int], damage: Sequence[Sequence[float | None] | None], budget: int, least: int
) -> list[int]:
    """Cells of each layer for the least sum of the layers' damages; they sum to len(damage) * budget.

    Damages are taken to add up. Each layer has max(least, 2 * budget // 3); the other cells go one after the
    other where they lessen damage most. Between two sizes damage is linear, below the first and above the
    last one constant; each layer's curve is made falling and convex first. What helps nowhere is dealt out
    evenly.
    Layers without a curve (None) get `budget`, which they do not use.

    Args:
        sizes, damage: as in Calibration. budget: mean of a layer; at least `least`, which every layer needs.
    """
    floor = max(least, 2 * budget // 3)
    sharing = [i for i, curve in enumerate(damage) if curve is not None]
    cells = [budget if curve is None else floor for curve in damage]
    pieces = [piece for i in sharing for piece in _pieces(i, sizes, damage[i] or (), floor)]
    left = len(sharing) * (budget - floor)
    for _, layer, room in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        got = min(room, left)
        cells[layer] += got
        left -= got
    for n, layer in enumerate(sharing):
        cells[layer] += left // len(sharing) + (n < left % len(sharing))
    return cells


def _pieces(
    layer: int, sizes: Sequence[int], damage: Sequence[float | None], floor: int
) -> list[tuple[float, int, int]]:
    """A curve's lower convex hull from `floor` on, steepest first: (nats less per cell, layer, cells)."""
    known: list[tuple[int, float]] = []
    for size, value in zip(sizes, damage, strict=True):
        lowest = known[-1][1] if known else math.inf
        known.append((size, lowest if value is None else min(lowest, value)))
    points = [(floor, _at(known, floor))] + [point for point in known if point[0] > floor]
    found, at = [], 0
    while at < len(points) - 1:
        slopes = [
            ((points[at][1] - nats) / (size - points[at][0]), i)
            for i, (size, nats) in enumerate(points[at + 1 :], at + 1)
        ]
        slope, best = max(slopes)  # of equal slopes the farthest point
        if slope <= 0:
            break
        found.append((slope, layer, points[best][0] - points[at][0]))
        at = best
    return found


def _at(known: Sequence[tuple[int, float]], size: int) -> float:
    """The damage at a size, by linear interpolation."""
    before = [point for point in known if point[0] <= size]
    after = [point for point in known if point[0] > size]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


def beside(model: str | os.PathLike[str]) -> Path:
    """Where a model's calibration is looked for: MODEL.gguf, MODEL.rkv.json."""
    return Path(model).with_suffix(".rkv.json")


def layer_budgets(
    model: str | os.PathLike[str], given: str, budget: int, least: int, n_layer: int | None = None
) -> list[int]:
    """Budgets of each layer of a model from its calibration.

    Args:
        model: the GGUF file. given: "calibrated", for the file beside it, or another file.
        budget, least: a KVBudget's budget and least_budget.
        n_layer: how many budgets are needed; None: as many as there are.

    Raises:
        ValueError: there is none, it is damaged, or of another model.
    """
    path = beside(model) if given == "calibrated" else Path(given)
    made = Calibration.load(path, model)
    if n_layer is not None and len(made.damage) != n_layer:
        raise ValueError(
            f"the calibration {path} is damaged: {len(made.damage)} curves for {n_layer} layers; "
            "rkv-local calibrate makes it anew"
        )
    return allocate(made.sizes, made.damage, budget, least)


def fingerprint(model: str | os.PathLike[str]) -> tuple[int, str]:
    """Bytes of a file, and the SHA-256 of its first 4 MiB and of 64 pieces of 64 KiB spread over it.

    Two files that differ only elsewhere are not told apart: models of several gigabytes are not read whole.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        stat = Path(model).stat()
        return stat.st_size, _fingerprint(os.fspath(model), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"cannot read the model file: {error}") from None


@functools.lru_cache(maxsize=8)
def _fingerprint(path: str, size: int, _mtime: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        digest.update(file.read(_HEAD))
        for i in range(_CHUNKS):
            start = _HEAD + max(0, size - _HEAD - _CHUNK) * i // (_CHUNKS - 1)
            file.seek(start)
            digest.update(file.read(_CHUNK))
    return "sha256:" + digest.hexdigest()


def _wrong(found: dict[str, Any]) -> str | None:
    """What is wrong with a file's content, if anything."""
    types = {"model": str, "bytes": int, "fingerprint": str, "policy": str, "settings": dict, "sizes": list}
    types |= {"damage": list, "tokens": int, "rkv_local": str}
    if set(found) != set(types):
        names = sorted(set(found) ^ set(types))
        return (
            f"{'these keys are' if len(names) > 1 else 'this key is'} missing or unknown: {', '.join(names)}"
        )
    for name, kind in types.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            return f"{name} is {str(found[name])[:40]!r}"
    return _wrong_sizes(found["sizes"]) or _wrong_damage(found["damage"], len(found["sizes"]))


def _wrong_sizes(sizes: Sequence[Any]) -> str | None:
    whole = bool(sizes) and all(isinstance(n, int) and _is_number(n) and n > 0 for n in sizes)
    if not whole or list(sizes) != sorted(set(sizes)):
        return f"sizes is {str(sizes)[:40]}"
    return None


def _wrong_damage(damage: Sequence[Any], n: int) -> str | None:
    curves = [curve for curve in damage if curve is not None]
    if not curves:
        return "there is no damage"
    for curve in curves:
        if not isinstance(curve, list) or len(curve) != n or curve[0] is None:
            return f"a layer's damage is {str(curve)[:40]}"
        for nats in curve:
            if nats is not None and not (_is_number(nats) and 0 <= nats < math.inf):
                return f"a damage is {nats!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
