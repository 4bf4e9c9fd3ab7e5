"""One compaction of a live context against the numpy reference, in every layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import reference as ref
from engine_tools import Context


def compact_and_check(
    context: Context,
    rope: ref.Rope,
    n_old: Sequence[int],
    seq: int = 0,
    rel: float = 1e-5,
    tally: ref.Tally | None = None,
) -> list[int]:
    """Dump K, V, Q and positions, compact, compare what is kept; kept cells must be the same bits as before.

    n_old: cells of each layer that went through a compaction before. Returns the cells that each holds now.
    """
    options, model = context.options, context.model
    spec, layers = options.spec, range(model.n_layer)
    budgets = options.layer_budgets or [spec.budget] * model.n_layer
    latest = spec.policy == "latest"
    keys = [context.per_head("keys", layer, seq) for layer in layers]
    values = [context.per_head("values", layer, seq) for layer in layers]
    queries = [context.queries(layer, seq) for layer in layers]
    before = [context.all_positions(layer, seq) for layer in layers]
    stored = [context.stored(layer, spec.n_sim, seq) if latest else None for layer in layers]
    assert context.compact(seq)
    held = []
    for layer in layers:
        after, heads = context.all_positions(layer, seq), np.arange(model.n_head_kv)
        rows = [np.searchsorted(before[layer][:, h], after[:, h]) for h in heads]
        for h in heads:
            assert (np.diff(before[layer][:, h]) > 0).all()
            np.testing.assert_array_equal(before[layer][rows[h], h], after[:, h])
        k, q = keys[layer], queries[layer]
        if options.type_k.startswith(("q", "iq")):
            k, q = ref.hadamard(k), ref.hadamard(q)
        mine = replace(spec, budget=budgets[layer], scale=context.attn_scale(layer), rope=rope)
        aux = stored[layer]
        if aux is not None:
            aux[:, n_old[layer] :] = ref.MISSING  # cells that were never compared
        right = ref.check_kept(rows, k, q, mine, before[layer], aux, n_old[layer], rel, tally)
        gather = np.stack(rows, axis=1)  # [kept, n_head_kv]
        np.testing.assert_array_equal(context.per_head("keys", layer, seq), keys[layer][gather, heads])
        np.testing.assert_array_equal(context.per_head("values", layer, seq), values[layer][gather, heads])
        if right.aux is not None:
            now = context.stored(layer, spec.n_sim, seq)
            np.testing.assert_allclose(now, right.aux[:, gather, heads], atol=1e-5)
        held.append(after.shape[0])
    return held
