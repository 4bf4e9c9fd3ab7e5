"""Results in a JSON Lines file to which every finished problem is appended, so that a run can be resumed.

Three kinds of lines. `config`: a configuration and its key `c`; `run`: what it ran on; and one line for each
problem: c, id, ok, n (tokens generated), s (seconds since the line before it), answer, limit (1 where the
token limit was hit), and what a task adds. A line cut short at the end of the file, where a run was killed,
is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from rkv_local.budget import KVBudget

__all__ = ["Config", "Results", "Store", "kv_fields", "read"]

Row = dict[str, Any]


def kv_fields(kv: KVBudget | None, n_layer: int = 0) -> Row | None:
    """A budget's parameters for JSON; None for a full cache. Named layer budgets become numbers."""
    if kv is None or not kv.active:
        return None
    fields = asdict(kv)
    fields["batch"] = kv.n_batch
    if kv.value_weight == 0:  # results without it are older than the field
        del fields["value_weight"]
    if kv.layer_budgets not in (None, "uniform") and n_layer:
        fields["schedule"] = kv.layer_budgets if isinstance(kv.layer_budgets, str) else "custom"
        fields["layer_budgets"] = list(kv.budgets(n_layer))
    return fields


@dataclass(frozen=True)
class Config:
    """What decides a result, up to rounding: model, task, cache, sampling.

    task: its name and parameters, as JSON; kv: kv_fields(); percent: the share of the mean trace that was
    asked for, not part of the key.
    """

    model: str
    sha256: str
    task: Row
    kv: Row | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    max_tokens: int = 0
    temp: float = 0.0
    seed: int = 0
    percent: float | None = None

    @property
    def key(self) -> str:
        """10 hexadecimal digits. The model's name is not part of it, its checksum is."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("model", "percent")}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def policy(self) -> str:
        """The policy's name; "full" without a budget."""
        return str(self.kv["policy"]) if self.kv else "full"

    @property
    def budget(self) -> int | None:
        """Cells; None without a budget."""
        return int(self.kv["budget"]) if self.kv else None

    def as_row(self) -> Row:
        """The line of this configuration."""
        return {"row": "config", "c": self.key, **asdict(self)}

    @classmethod
    def of_row(cls, row: Row) -> Config:
        """From its line. Raises KeyError where something is missing."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


class Results:
    """Configurations, their runs and their problems, by key."""

    def __init__(self) -> None:
        self.configs: dict[str, Config] = {}
        self.runs: dict[str, list[Row]] = {}
        self.problems: dict[str, dict[str, Row]] = {}

    def take(self, row: Row) -> None:
        """Add a line. Raises ValueError if it is none of the three kinds."""
        try:
            key, kind = row["c"], row.get("row")
            if kind == "config":
                config, before = Config.of_row(row), self.configs.get(key)
                if config.percent is None and before is not None:
                    config = replace(config, percent=before.percent)
                self.configs[key] = config
            elif kind == "run":
                self.runs.setdefault(key, []).append(row)
            elif kind is None and isinstance(row["id"], str):
                self.problems.setdefault(key, {})[row["id"]] = row
            else:
                raise KeyError
        except (KeyError, TypeError):
            raise ValueError("not a result of rkv-local eval") from None

    def done(self, config: Config) -> dict[str, Row]:
        """Problems of this configuration that have a result, by id."""
        return self.problems.get(config.key, {})

    def full(self, config: Config) -> list[Config]:
        """Configurations with a full cache that differ in nothing else but the types, f16 first."""

        def same(c: Config) -> tuple[Any, ...]:
            return c.sha256, c.task, c.max_tokens, c.temp, c.seed

        found = [c for c in self.configs.values() if c.kv is None and same(c) == same(config)]
        return sorted(found, key=lambda c: (c.type_k, c.type_v) != ("f16", "f16"))

    def mean_trace(self, config: Config, ids: Iterable[str] | None = None) -> float | None:
        """Mean tokens generated with a full cache, over these problems (None: all that there are).

        None where they have no results, or not all.
        """
        for full in self.full(config):
            rows = self.done(full)
            wanted = list(rows if ids is None else ids)
            if wanted and all(i in rows for i in wanted):
                return sum(rows[i]["n"] for i in wanted) / len(wanted)
        return None

    def full_accuracy(self, config: Config) -> float | None:
        """Share of this configuration's problems that the full cache gets right; None where it lacks some."""
        ids = self.done(config)
        for full in self.full(config):
            rows = self.done(full)
            if ids and all(i in rows for i in ids):
                return float(sum(rows[i]["ok"] for i in ids) / len(ids))
        return None


def read(paths: Iterable[Path]) -> Results:
    """Results of several files (also .gz). A problem that several of them have is that of the last.

    Raises:
        ValueError: a file that is absent, or has a line that is no result (but for a last one cut short).
    """
    results = Results()
    for path in paths:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError) as err:
            raise ValueError(f"cannot read {path}: {getattr(err, 'strerror', None) or err}") from None
        _take_all(results, data, str(path))
    return results


def _take_all(results: Results, data: bytes, name: str) -> int:
    """Take all lines; the bytes up to the end of the last whole one."""
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if end + len(line) == len(data) and not line.endswith(b"\n"):
                return end
            raise ValueError(f"{name}, line {number}, is not JSON") from None
        try:
            results.take(row)
        except ValueError as err:
            raise ValueError(f"{name}, line {number}, is {err}") from None
        end += len(line)
    return end


class Store(Results):
    """Results that are written as they come. path None: kept in memory only.

    known: results of other files, which count as done and are not written.

    Raises:
        ValueError: the file has lines that are no results. OSError: it cannot be written. RuntimeError:
            another process is writing to it.
    """

    def __init__(self, path: Path | None = None, known: Results | None = None) -> None:
        super().__init__()
        self._file: IO[bytes] | None = None
        self._last = time.monotonic()
        self._begun: set[str] = set()  # configurations whose line is in the file
        if path is not None:
            self._open(path)
            self._begun |= self.configs.keys()
        for row in lines(known) if known else ():
            self.take(row)

    def _open(self, path: Path) -> None:
        if path.suffix == ".gz":
            raise ValueError(f"{path}: results are appended line by line, which .gz does not allow")
        path.touch()
        self._file = path.open("r+b")
        try:
            _lock(self._file, path)
            data = self._file.read()
            end = _take_all(self, data, str(path))
        except BaseException:
            self._file.close()
            raise
        self._file.seek(end)
        self._file.truncate()
        if end and not data[:end].endswith(b"\n"):
            self._write(b"\n")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, config: Config, run: Row) -> None:
        """A configuration is run (again): what it is, once, and what it runs on."""
        if config.key not in self._begun:
            self._begun.add(config.key)
            self._append(config.as_row())
        self._append({"row": "run", "c": config.key, **run})
        self._last = time.monotonic()

    def add(self, config: Config, id: str, **fields: Any) -> Row:
        """A problem is finished. s is the time since the last one: its sum is the time of all."""
        now = time.monotonic()
        row = {"c": config.key, "id": id, **fields, "s": round(now - self._last, 3)}
        self._last = now
        self._append(row)
        return row

    def _append(self, row: Row) -> None:
        text = json.dumps(row, separators=(",", ":"), ensure_ascii=False)
        self.take(json.loads(text))  # as it will be read
        self._write(text.encode("utf-8", errors="replace") + b"\n")

    def _write(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)
            self._file.flush()


def _lock(file: IO[bytes], path: Path) -> None:
    """One writer at a time, where the system can say so."""
    if os.name == "nt":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is writing results to {path}") from None
    except OSError:
        return  # a file system without locks


def lines(results: Results) -> Iterator[Row]:
    """All lines again, sorted by configuration: for a smaller file without the order of time."""
    for key, config in results.configs.items():
        yield config.as_row()
        yield from results.runs.get(key, [])
        yield from results.problems.get(key, {}).values()


def packed(results: Results, path: Path) -> None:
    """Write results to a new file, the same bytes for the same results; packed if its name ends in .gz."""
    rows = (json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in lines(results))
    data = "".join(f"{row}\n" for row in rows).encode("utf-8", errors="replace")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
