// Layout of the cells and the rules for sequences. The pass itself is in rkv-compact.cpp.

#include "rkv-cache.h"
#include "rkv-init.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

std::unique_ptr<rkv_cache> rkv_cache::create(llama_kv_cache & kv, uint32_t n_stream) {
    if (!rkv_pending_get() || rkv_pending_get()->taken) {
        return nullptr;
    }
    std::unique_ptr<rkv_cache> res(new rkv_cache(kv, n_stream));
    rkv_pending_get()->taken = true;
    rkv_pending_get()->cache = res.get();
    return res;
}

rkv_cache::rkv_cache(llama_kv_cache & kv, uint32_t n_stream) : kv(kv), model(*rkv_pending_get()->model), n_stream(n_stream) {
    const rkv_pending & pending = *rkv_pending_get();

    params        = pending.params;
    layer_budgets = pending.layer_budgets;
    cparams       = std::make_unique<llama_cparams>(*pending.cparams);
    n_extra       = std::max(params.buffer, params.n_batch_seq);

    // groups, the widest first
    const uint32_t n_layer = model.hparams.n_layer_all;
    std::vector<uint32_t> budgets = layer_budgets;
    budgets.resize(n_layer, layer_budgets.empty() ? params.budget : layer_budgets.back());

    std::vector<uint32_t> sizes = budgets;
    std::sort(sizes.begin(), sizes.end(), std::greater<uint32_t>());
    sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
    for (const uint32_t size : sizes) {
        groups.push_back({ size, sizes.front() - size, 0 });
    }
    for (const uint32_t budget : budgets) {
        layer_group.push_back(std::find(sizes.begin(), sizes.end(), budget) - sizes.begin());
    }
    n_budget_max = sizes.front();
    n_start      = groups.back().off;

    params.layer_budgets   = nullptr;
    params.n_layer_budgets = 0;

    streams.resize(n_stream);
    clear();
}

rkv_cache::~rkv_cache() = default;

void rkv_cache::add_layer(ggml_context * ctx, uint32_t il, ggml_tensor * k, ggml_tensor * v) {
    const llama_hparams & hp = model.hparams;

    layer_t l = {};
    l.il        = il;
    l.group     = group_of(il);
    l.n_head    = hp.n_head(il);
    l.n_head_kv = hp.n_head_kv(il);
    l.k         = k;
    l.v         = v;
    l.rope      = -1;

    const int32_t n_embd_head = hp.n_embd_head_k(il);
    const bool    latest      = params.policy == RKV_POLICY_LATEST;

    l.q   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, (int64_t) n_embd_head*l.n_head, params.window + 1, n_stream);
    l.pos = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, k->ne[1], l.n_head_kv, n_stream);
    l.aux = latest ? ggml_new_tensor_4d(ctx, GGML_TYPE_F32, params.n_sim, k->ne[1], l.n_head_kv, n_stream) : nullptr;
    ggml_format_name(l.q,   "rkv_q_l%d", il);
    ggml_format_name(l.pos, "rkv_pos_l%d", il);
    if (l.aux) {
        ggml_format_name(l.aux, "rkv_aux_l%d", il);
    }

    l.op.policy      = params.policy;
    l.op.n_head_kv   = l.n_head_kv;
    l.op.window      = params.window;
    l.op.pool        = params.pool;
    l.op.pin         = params.pin;
    l.op.n_sim       = params.n_sim;
    l.op.flags       = params.reference ? RKV_FLAG_REFERENCE : 0;
    l.op.lambda      = params.lambda;
    l.op.threshold   = params.threshold;
    l.op.softcap     = hp.attn_soft_cap ? hp.f_attn_logit_softcapping : 0.0f;
    l.op.rope_mscale = 1.0f;

    if (model.arch == LLM_ARCH_GROK) { // caps its logits in the graph, with a scale of its own
        l.op.softcap = hp.f_attn_logit_softcapping;
        l.scale_mul  = hp.f_attn_out_scale;
    }

    if (hp.has_rope(il) && hp.rope_type != LLAMA_ROPE_TYPE_NONE) {
        if (hp.rope_type == LLAMA_ROPE_TYPE_NEOX) {
            l.op.flags |= RKV_FLAG_ROPE_NEOX;
        }
        const rope_t r = {
            (int32_t) hp.n_rot(il), model.get_rope_freq_base(*cparams, il), model.get_rope_freq_scale(*cparams, il),
            model.get_rope_factors(*cparams, il), {},
        };
        auto it = std::find_if(ropes.begin(), ropes.end(), [&](const rope_t & o) {
            return o.n_rot == r.n_rot && o.base == r.base && o.scale == r.scale && o.factors == r.factors;
        });
        if (it == ropes.end()) {
            it = ropes.insert(ropes.end(), r);
        }
        l.rope           = it - ropes.begin();
        l.op.n_rot       = r.n_rot;
        l.op.rope_mscale = rkv_rope_mscale(r.scale, cparams->yarn_ext_factor, cparams->yarn_attn_factor);
    }
    groups[l.group].layer = layers.size();
    layers.push_back(l);
}

const std::vector<float> * rkv_cache::rope_table(const layer_t & layer) const {
    if (layer.rope < 0) {
        return nullptr;
    }
    auto & r = const_cast<rope_t &>(ropes[layer.rope]);
    if (r.table.empty()) {
        std::vector<float> factors;
        if (r.factors) {
            factors.resize(r.n_rot/2);
            ggml_backend_tensor_get(r.factors, factors.data(), 0, factors.size()*sizeof(float));
        }
        const rkv_rope rope = {
            r.n_rot, (int32_t) cparams->n_ctx_orig_yarn, r.base, r.scale, cparams->yarn_ext_factor,
            cparams->yarn_attn_factor, cparams->yarn_beta_fast, cparams->yarn_beta_slow,
            factors.empty() ? nullptr : factors.data(),
        };
        r.table = rkv_rope_table(rope, cparams->n_ctx_seq);
    }
    return &r.table;
}

void rkv_cache::attach(llama_context * lctx) {
    this->lctx = lctx;
    rkv_set_error("%s", "");
}

void rkv_cache::clear() {
    for (auto & s : streams) {
        s = stream_t();
        s.ring.assign(params.window, -1);
    }
}

void rkv_cache::reset_if_empty(uint32_t strm) {
    if (cells(strm).get_used() == 0) {
        streams[strm] = stream_t();
        streams[strm].ring.assign(params.window, -1);
    }
}

//
// where things are
//

const llama_kv_cells & rkv_cache::cells(uint32_t strm) const { return kv.v_cells[strm]; }
bool rkv_cache::v_transposed() const { return kv.v_trans; }
const llama_hparams & rkv_cache::hparams() const { return model.hparams; }

int64_t rkv_cache::stream_of(llama_seq_id seq_id) const {
    return seq_id >= 0 && (uint32_t) seq_id < n_stream ? (int64_t) kv.seq_to_stream[seq_id] : -1;
}

const rkv_cache::layer_t * rkv_cache::find_layer(int32_t il) const {
    const auto it = std::find_if(layers.begin(), layers.end(), [il](const layer_t & l) { return (int32_t) l.il == il; });
    return it == layers.end() ? nullptr : &*it;
}

rkv_cache::layer_t * rkv_cache::find_layer(int32_t il) {
    return const_cast<layer_t *>(static_cast<const rkv_cache *>(this)->find_layer(il));
}

uint32_t rkv_cache::used_end(uint32_t strm) const {
    return cells(strm).get_used() == 0 ? n_start : cells(strm).used_max_p1();
}

int32_t rkv_cache::seq_used(llama_seq_id seq_id) const {
    const int64_t strm = stream_of(seq_id);
    return strm < 0 ? -1 : (int32_t) cells(strm).get_used();
}

int32_t rkv_cache::seq_room(llama_seq_id seq_id) const {
    const int64_t strm = stream_of(seq_id);
    if (strm < 0) {
        return -1;
    }
    const uint32_t limit = n_budget_max + params.buffer;
    return limit - std::min(limit, used_end(strm));
}

rkv_cache::range_t rkv_cache::range(const layer_t & layer, uint32_t strm) const {
    const uint32_t off = groups[layer.group].off;
    const auto &   c   = cells(strm);
    if (c.get_used() == 0) {
        return { 0, 0, 0 };
    }
    const uint32_t begin = std::max(c.used_min(), off);
    const uint32_t end   = c.used_max_p1();
    const uint32_t old   = std::clamp(streams[strm].old_end, begin, end);
    return { begin - off, old - off, end - off };
}

uint64_t rkv_cache::window_slots(uint32_t strm) const {
    const auto & c    = cells(strm);
    const auto & ring = streams[strm].ring;

    uint64_t slots = 0;
    uint32_t seen  = 0;
    for (int64_t i = (int64_t) c.used_max_p1() - 1; i >= 0 && seen < params.window; --i) {
        if (c.is_empty(i)) {
            continue;
        }
        const llama_pos pos = c.pos_get(i);
        if (ring[pos % params.window] == pos) {
            slots |= 1ull << (pos % params.window);
        }
        ++seen;
    }
    if (slots == 0) { // all of the window was removed and nothing came after it: the removed tokens' queries judge
        for (uint32_t i = 0; i < params.window; ++i) {
            slots |= ring[i] >= 0 ? 1ull << i : 0;
        }
    }
    return slots;
}

//
// rules for sequences
//

bool rkv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (seq_id != -1 && stream_of(seq_id) < 0) {
        return rkv_set_error("there is no sequence %d: the context has %u", seq_id, n_stream);
    }
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    for (uint32_t s = 0; s < n_stream; ++s) {
        const llama_seq_id id = s;
        if ((seq_id != -1 && stream_of(seq_id) != s) || !streams[s].compacted || cells(s).get_used() == 0) {
            continue;
        }
        const llama_pos last  = cells(s).seq_pos_max(id);
        const bool      none  = p0 >= p1 || p0 > last;
        const bool      whole = p0 == 0 && p1 > last;
        if (!none && !whole && p0 < streams[s].exact) {
            return rkv_set_error("positions [%d, %d) of sequence %u were compacted: remove the whole sequence, or from position %d on",
                p0, p1, s, streams[s].exact);
        }
    }
    return true;
}

bool rkv_cache::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos & p0, llama_pos & p1) {
    const int64_t s0 = stream_of(src), s1 = stream_of(dst);
    if (s0 < 0 || s1 < 0) {
        LLAMA_LOG_ERROR("%s: no sequence %d or %d: the context has %u\n", __func__, src, dst, n_stream);
        return rkv_set_error("there is no sequence %d: the context has %u", s0 < 0 ? src : dst, n_stream);
    }
    if (s0 == s1) {
        return false;
    }
    if (p0 > 0 && p0 > cells(s0).seq_pos_min(src)) {
        LLAMA_LOG_ERROR("%s: a cache with a budget copies whole sequences only\n", __func__);
        return rkv_set_error("a cache with a budget copies whole sequences only, not from position %d on", p0);
    }
    if (p1 >= 0 && p1 <= cells(s0).seq_pos_max(src)) {
        LLAMA_LOG_ERROR("%s: a cache with a budget copies whole sequences only\n", __func__);
        return rkv_set_error("a cache with a budget copies whole sequences only, not up to position %d", p1);
    }
    p0 = p1 = -1;
    streams[s1] = streams[s0];
    return true;
}

bool rkv_cache::seq_keep(llama_seq_id seq_id) {
    const int64_t keep = stream_of(seq_id);
    if (keep < 0) {
        LLAMA_LOG_ERROR("%s: no sequence %d: the context has %u\n", __func__, seq_id, n_stream);
        return rkv_set_error("there is no sequence %d: the context has %u", seq_id, n_stream);
    }
    for (uint32_t s = 0; s < n_stream; ++s) {
        if (s != keep) {
            kv.v_cells[s].reset();
            reset_if_empty(s);
        }
    }
    return true;
}

void rkv_cache::copy_stream(uint32_t src, uint32_t dst) {
    for (const auto & l : layers) {
        for (ggml_tensor * t : { l.q, l.pos, l.aux }) {
            if (!t) {
                continue;
            }
            const size_t size = t == l.aux ? t->nb[3] : t->nb[2];
            std::vector<uint8_t> data(size);
            ggml_backend_tensor_get(t, data.data(), src*size, size);
            ggml_backend_tensor_set(t, data.data(), dst*size, size);
        }
    }
}

bool rkv_cache::refuse_shift() const {
    LLAMA_LOG_ERROR("%s: positions cannot be shifted in a cache with a budget\n", __func__);
    rkv_set_error("positions cannot be shifted in a cache with a budget");
    return true;
}

//
// batches
//

bool rkv_cache::make_room(const std::vector<llama_ubatch> & ubatches) {
    std::vector<uint32_t> n_new(n_stream, 0);

    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const llama_seq_id id = ubatch.seq_id[i][0];
            if (ubatch.n_seq_id[i] != 1 || stream_of(id) < 0) {
                LLAMA_LOG_ERROR("%s: each token must belong to one sequence of the %u\n", __func__, n_stream);
                return rkv_set_error("each token of a batch must belong to exactly one of the %u sequences", n_stream);
            }
            if (ubatch.pos[i] < 0 || (uint32_t) ubatch.pos[i] >= cparams->n_ctx_seq) {
                LLAMA_LOG_ERROR("%s: position %d is outside the context of %u\n", __func__, ubatch.pos[i], cparams->n_ctx_seq);
                return rkv_set_error("position %d is outside the context of %u tokens: raise n_ctx", ubatch.pos[i], cparams->n_ctx_seq);
            }
            n_new[stream_of(id)]++;
        }
    }

    std::vector<uint32_t> full;
    for (uint32_t s = 0; s < n_stream; ++s) {
        if (n_new[s] == 0) {
            continue;
        }
        if (n_new[s] > n_extra) {
            LLAMA_LOG_ERROR("%s: %u tokens of one sequence in a batch, the cache takes %u\n", __func__, n_new[s], n_extra);
            return rkv_set_error("%u tokens of one sequence in one batch: this cache takes %u at a time", n_new[s], n_extra);
        }
        reset_if_empty(s);
        streams[s].old_end = std::min(streams[s].old_end, used_end(s));
        const auto is_full = [&] {
            return used_end(s) >= n_budget_max + params.buffer || used_end(s) + n_new[s] > n_cells();
        };
        if (!is_full()) {
            continue;
        }
        if (!close_holes(s)) {
            return false;
        }
        if (is_full()) {
            full.push_back(s);
        }
    }
    return full.empty() || compact(full);
}

std::vector<uint32_t> rkv_cache::find_rows(uint32_t strm, uint32_t n_tokens) const {
    const uint32_t begin = used_end(strm);
    if (begin + n_tokens > n_cells()) {
        return {};
    }
    std::vector<uint32_t> rows(n_tokens);
    for (uint32_t i = 0; i < n_tokens; ++i) {
        rows[i] = begin + i;
    }
    return rows;
}

// In steady state a single value, so that the decode graph is reused from one compaction to the next.
uint32_t rkv_cache::n_kv(uint32_t used_max_p1) {
    if (n_kv_pad == 0) { // CUDA's flash attention leaves its fast kernels for an n_kv that is not a multiple of 256
        n_kv_pad = std::all_of(layers.begin(), layers.end(), [](const layer_t & l) {
            return !l.k->buffer || ggml_backend_buffer_is_host(l.k->buffer);
        }) ? 32 : 256;
    }
    const uint32_t steady  = std::min(n_cells(), (uint32_t) GGML_PAD(n_budget_max + params.buffer, n_kv_pad));
    if (used_max_p1 <= n_budget_max) {
        return std::min(n_cells(), std::max(256u, (uint32_t) GGML_PAD(used_max_p1, 256)));
    }
    return used_max_p1 <= steady ? steady : n_cells();
}

rkv_stats rkv_cache::stats() const {
    rkv_stats st = {};
    st.active = true;
    st.cells  = n_cells();
    for (const auto & l : layers) {
        st.bytes_kv += ggml_nbytes(l.k) + ggml_nbytes(l.v);
        st.bytes    += ggml_nbytes(l.q) + ggml_nbytes(l.pos) + (l.aux ? ggml_nbytes(l.aux) : 0);
    }
    st.bytes          += st.bytes_kv;
    st.compactions     = n_compactions;
    st.t_compaction_us = t_us;
    st.tokens_evicted  = (uint64_t) n_evicted;
    return st;
}

bool rkv_cache::all_captured() const {
    return std::all_of(layers.begin(), layers.end(), [](const layer_t & l) { return l.captured; });
}
