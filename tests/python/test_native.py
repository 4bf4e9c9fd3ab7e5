"""rkv_local._native mirrors native/rkv.h."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamas import SMALL, TEXT
from rkv_local import POLICIES, KVBudget, Llama, RKVError, _native, _structs

pytest_plugins = ["llamas"]


# --- the C interface ---


def test_struct_layouts_equal_the_header(tmp_path: Path) -> None:
    """native/rkv.h, compiled with stand-ins for llama.h, prints the offset of every field."""
    structs = {
        "rkv_params": _structs.RkvParams,
        "rkv_stats": _structs.RkvStats,
        "rkv_memory": _structs.RkvMemory,
        "rkv_select_args": _structs.RkvSelectArgs,
    }
    header = Path(__file__).parents[2] / "native" / "rkv.h"
    (tmp_path / "llama.h").write_text(
        "#pragma once\n#include <stdint.h>\n#define LLAMA_API\ntypedef int32_t llama_seq_id;\n"
        "struct llama_model; struct llama_context; struct llama_context_params { int x; };\n"
    )
    lines = [f'#include "{header}"', "#include <stdio.h>", "#include <stddef.h>", "int main(void) {"]
    lines.append('printf("version %d\\n", RKV_VERSION);')
    for name, struct in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for field in struct._fields_:
            c_name = field[0].rstrip("_")
            lines.append(f'printf("{name}.{c_name} %zu\\n", offsetof(struct {name}, {c_name}));')
    (tmp_path / "layout.c").write_text("\n".join([*lines, "return 0; }"]))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "a C compiler is needed to check the struct layouts"
    program = tmp_path / "layout"
    subprocess.run([compiler, "-I", tmp_path, "-o", program, tmp_path / "layout.c"], check=True)
    printed = dict(line.split() for line in subprocess.check_output([program], text=True).splitlines())
    expected = {"version": _structs.RKV_VERSION}
    for name, struct in structs.items():
        expected[name] = ctypes.sizeof(struct)
        for field in struct._fields_:
            expected[f"{name}.{field[0].rstrip('_')}"] = getattr(struct, field[0]).offset
    assert {key: int(value) for key, value in printed.items()} == expected
    text = header.read_text()
    for name, struct in structs.items():  # no field was left out
        body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL)
        assert body
        code = re.sub(r"//.*", "", body[1])
        names = [
            re.sub(r".*[\s*]|\[\d+\]$", "", part.strip())
            for line in code.split(";")
            for part in line.split(",")
        ]
        assert [n for n in names if n] == [field[0].rstrip("_") for field in struct._fields_]


def test_policies_defaults_and_checks_are_the_librarys() -> None:
    assert [_native.policy_name(i) for i in range(len(POLICIES))] == list(POLICIES)
    assert _native.policy_name(len(POLICIES)) is None
    assert _native.version() == _structs.RKV_VERSION
    assert "0.3.36" in _native.build_info()
    ours, theirs = _native.params(KVBudget(batch=1)), _native.default_params()
    ours.n_batch_seq = theirs.n_batch_seq
    policys_own = ("layer_budgets", "n_sim", "memory", "chunk", "recent", "value_weight")
    for name, *_ in ours._fields_:
        if name not in policys_own:
            assert getattr(ours, name) == getattr(theirs, name), name
    bad: list[tuple[str, Any]] = [
        ("policy", 14), ("policy", -1), ("budget", 0), ("buffer", 0), ("window", 0), ("window", 65),
        ("pin", 1016),
        ("pool", 0), ("pool", 8), ("lambda_", -0.1), ("lambda_", 1.1), ("lambda_", float("nan")),
        ("threshold", 1.5), ("threshold", float("nan")), ("n_sim", 5),
        ("memory", 1.1), ("memory", float("nan")), ("chunk", 4097), ("recent", 4097), ("growth", 0),
        ("value_share", 1.1), ("value_weight", 1.1), ("value_weight", float("nan")),
    ]  # fmt: skip
    _native.params_check(_native.default_params())
    for name, value in bad:
        params = _native.default_params()
        setattr(params, name, value)
        with pytest.raises(ValueError, match=r".") as caught:
            _native.params_check(params)
        assert "\n" not in str(caught.value), name


def test_low_level_arrays(llama: Llama) -> None:
    llama.forget()
    llama.eval(llama.tokenize(TEXT.encode())[:200])
    n = llama.kv_used()
    assert n == _native.seq_used(llama.ctx) == len(_native.kept_positions(llama.ctx, 4, 2))
    assert _native.keys(llama.ctx, 4, 2).shape == (n, 64)
    assert _native.keys_unrotated(llama.ctx, 4, 2).shape == (n, 64)
    assert _native.values(llama.ctx, 4, 2).shape == (n, 64)
    assert _native.queries(llama.ctx, 4).shape == (8, 9, 64)
    assert _native.attn_scale(llama.ctx, 4) == pytest.approx(64**-0.5)
    np.testing.assert_allclose(
        np.linalg.norm(_native.keys(llama.ctx, 4, 2), axis=1),
        np.linalg.norm(_native.keys_unrotated(llama.ctx, 4, 2), axis=1),
        rtol=1e-2,
    )
    for call in (
        lambda: _native.keys(llama.ctx, 4, 3),
        lambda: _native.kept_positions(llama.ctx, 30, 0),
        lambda: _native.queries(llama.ctx, -1),
        lambda: _native.attn_scale(llama.ctx, 99),
        lambda: _native.seq_used(llama.ctx, 9),
    ):
        with pytest.raises(IndexError):
            call()


def test_select_by_itself() -> None:
    rng = np.random.default_rng(1)
    k = rng.standard_normal((50, 2, 32), dtype=np.float32)
    q = rng.standard_normal((8, 4, 32), dtype=np.float32)
    kv = KVBudget(budget=20, policy="streaming")
    idx, score = _native.select(kv, k, q)
    assert idx.shape == (2, 20) and score.shape == (2, 50)
    assert idx[0].tolist() == [0, 1, 2, 3, *range(34, 50)]
    rope = _native.Rope(32, neox=True, freq_factors=np.ones(16))
    pos = np.repeat(np.arange(50, dtype=np.int32)[:, None], 2, axis=1)
    np.testing.assert_allclose(_native.unrotate(k, 0 * pos, rope), k, atol=1e-6)
    assert not np.allclose(_native.unrotate(k, pos, rope)[1:], k[1:])
    for arguments, message in [
        ({"k": k[0]}, "k has shape"),
        ({"q": q[:3]}, "q has shape"),
        ({"pos": pos[:3]}, "pos has shape"),
        ({"aux": np.zeros((1, 3, 2), np.float32)}, "aux must be"),
        ({"rope": _native.Rope(32, freq_factors=np.ones(3))}, "freq_factors has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.select(**{"kv": kv, "k": k, "q": q, **arguments})


def test_context_without_a_llama(llama: Llama) -> None:
    from llama_cpp import llama_cpp as low

    cparams = low.llama_context_default_params()
    cparams.n_ctx, cparams.n_batch, cparams.n_ubatch = 4096, 64, 64
    ctx = _native.init_context(llama.model, cparams, SMALL)
    assert _native.stats(ctx).bytes == SMALL.bytes_for(llama)
    low.llama_free(ctx)
    with pytest.raises(RKVError, match=r"."):
        _native.init_context(llama.model, cparams, KVBudget(layer_budgets=[64]))
    with pytest.raises(RKVError, match=r"."), _native.pending_budget(SMALL):
        pass  # no context was made


def test_memory_of_a_compaction(make: Any, stock: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a score per cell and an index per kept one, for 3 heads; the generic path: its cap."""

    def temporary(llama: Llama) -> int:
        return sum(m.temporary for m in _native.memory(llama.ctx))

    llama = make(kv=SMALL)
    need = 4 * 3 * (_native.stats(llama.ctx).cells + SMALL.budget)
    assert need <= temporary(llama) < 2 << 20
    assert temporary(stock) == 0
    monkeypatch.setenv("RKV_GENERIC", "1")
    assert temporary(make(kv=SMALL)) >= 64 << 20


def test_import_is_cheap() -> None:
    code = "import rkv_local, sys; assert not {'llama_cpp', 'numpy'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
