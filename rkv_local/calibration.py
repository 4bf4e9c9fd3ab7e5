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

FORMAT, FORMAT_VERSION = "rkv-local calibration", 1
_HEAD, _CHUNK, _CHUNKS = 4 << 20, 1 << 16, 64  # bytes of a model that its fingerprint is made of


@dataclass(frozen=True)
class Calibration:
    """The share of all cells that each layer won.

    Args:
        model: its file's name; bytes, fingerprint: which file that was.
        policy: whose scores were ranked; settings: the KVBudget's other fields then. The shares serve any
            policy.
        shares: one per layer, adding up to 1; None for a layer without cells under the budget.
        tokens: that were generated or read; compactions: that the shares are the mean of.
        rkv_local: the version that made it.
    """

    model: str
    bytes: int
    fingerprint: str
    policy: str
    settings: dict[str, Any]
    shares: tuple[float | None, ...]
    tokens: int
    compactions: int
    rkv_local: str

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        kv: KVBudget,
        shares: Sequence[float | None],
        tokens: int,
        compactions: int,
    ) -> Calibration:
        """What was measured with `kv` for a model's file. Raises ValueError if the file cannot be read."""
        from . import __version__

        size, digest = fingerprint(model)
        unused = ("policy", "layer_budgets", "batch")
        return cls(
            model=Path(model).name.encode("utf-8", "backslashreplace").decode(),
            bytes=size,
            fingerprint=digest,
            policy=kv.policy,
            settings={name: value for name, value in asdict(kv).items() if name not in unused},
            shares=tuple(shares),
            tokens=tokens,
            compactions=compactions,
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
        made = cls(**{**found, "shares": tuple(found["shares"])})
        if model is not None and (made.bytes, made.fingerprint) != fingerprint(model):
            raise ValueError(
                f"the calibration {path} belongs to another model, {made.model} of {made.bytes:,} bytes; "
                f"{again}"
            )
        return made


def share_out(shares: Sequence[float | None], budget: int, least: int) -> list[int]:
    """Cells of each layer from their shares; the sum is exactly len(shares) * budget.

    Each layer gets `least` and its share of what is left, rounded down; the cells that this leaves go to the
    largest remainders, earlier layers first among equals. Layers without a share (None) get `budget`, which
    they do not use.
    """
    sharing = [i for i, share in enumerate(shares) if share is not None]
    whole = math.fsum(shares[i] or 0.0 for i in sharing)
    spare = len(sharing) * (budget - least)
    exact = {i: (shares[i] or 0.0) / whole * spare for i in sharing}
    found = [budget if share is None else least + math.floor(exact[i]) for i, share in enumerate(shares)]
    by_remainder = sorted(sharing, key=lambda i: (math.floor(exact[i]) - exact[i], i))
    for i in by_remainder[: len(shares) * budget - sum(found)]:
        found[i] += 1
    return found


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
    if n_layer is not None and len(made.shares) != n_layer:
        raise ValueError(
            f"the calibration {path} is damaged: {len(made.shares)} shares for {n_layer} layers; "
            "rkv-local calibrate makes it anew"
        )
    return share_out(made.shares, budget, least)


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
    types = {"model": str, "bytes": int, "fingerprint": str, "policy": str, "settings": dict, "shares": list}
    types |= {"tokens": int, "compactions": int, "rkv_local": str}
    if set(found) != set(types):
        names = sorted(set(found) ^ set(types))
        return (
            f"{'these keys are' if len(names) > 1 else 'this key is'} missing or unknown: {', '.join(names)}"
        )
    for name, kind in types.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            return f"{name} is {str(found[name])[:40]!r}"
    return _wrong_shares(found["shares"])


def _wrong_shares(shares: Sequence[Any]) -> str | None:
    numbers = [share for share in shares if share is not None]
    for share in numbers:
        if (
            isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1
        ):  # NaN is not
            return f"a share is {share!r}"
    if not numbers or abs(sum(numbers) - 1) > 1e-3:
        return f"the shares add up to {sum(numbers):g}"
    return None
