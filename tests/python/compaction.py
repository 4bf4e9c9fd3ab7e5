"""One compaction of a live context against the numpy reference, in every layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    sinks: Mapping[int, np.ndarray] | None = None,
    rotated: bool | None = None,
    stats: dict[int, np.ndarray] | None = None,
) -> list[int]:
    """Dump K, V, Q and positions, compact, compare what is kept; kept cells must be the same bits as before.

    n_old: cells of each layer with a budget that went through a compaction before. Returns the cells that
    each holds now. sinks: of each layer, [n_head]; rotated: what is cached went through the Hadamard rotation
    (None: as the type says). stats: triattention's, of each layer, updated here.
    """
    options = context.options
    spec, layers = options.spec, list(context.layers)
    if rotated is None:
        rotated = options.type_k.startswith(("q", "iq"))
    rotated_v = options.type_v.startswith(("q", "iq"))
    keys = {il: context.per_head("keys", il, seq) for il in layers}
    values = {il: context.per_head("values", il, seq) for il in layers}
    queries = {il: context.queries(il, seq) for il in layers}
    before = {il: context.all_positions(il, seq) for il in layers}
    stored = {il: context.stored(il, spec.n_aux, seq) if spec.n_aux else None for il in layers}
    assert context.compact(seq)
    if spec.policy == "rpc":  # its target is one for all layers
        spec = replace(spec, recent=spec.tail(min(layer.budget for layer in context.layers.values())))
    held = []
    for layer, old in zip(layers, n_old, strict=True):
        after, heads = context.all_positions(layer, seq), np.arange(context.layers[layer].n_head_kv)
        rows = [np.searchsorted(before[layer][:, h], after[:, h]) for h in heads]
        for h in heads:
            assert (np.diff(before[layer][:, h]) > 0).all()
            np.testing.assert_array_equal(before[layer][rows[h], h], after[:, h])
        k, q = keys[layer], queries[layer]
        if rotated:
            k, q = ref.hadamard(k), ref.hadamard(q)
        shape = context.layers[layer]
        mine = replace(spec, budget=shape.budget, scale=shape.scale, softcap=shape.softcap, rope=rope)
        mine = replace(mine, sinks=(sinks or {}).get(layer), layer=layer)
        v = ref.hadamard(values[layer]) if rotated_v else values[layer]
        aux = stored[layer]
        if aux is not None:
            aux[:, old:] = ref.MISSING  # cells that were never compared
        known = (stats or {}).get(layer)
        right = ref.check_kept(rows, k, q, mine, before[layer], aux, old, rel, tally, v, known)
        if stats is not None and right.stats is not None:
            stats[layer] = right.stats
        gather = np.stack(rows, axis=1)  # [kept, n_head_kv]
        np.testing.assert_array_equal(context.per_head("keys", layer, seq), keys[layer][gather, heads])
        np.testing.assert_array_equal(context.per_head("values", layer, seq), values[layer][gather, heads])
        if right.aux is not None:
            now = context.stored(layer, spec.n_aux, seq)
            np.testing.assert_allclose(now, right.aux[:, gather, heads], atol=1e-5)
        held.append(after.shape[0])
    return held
