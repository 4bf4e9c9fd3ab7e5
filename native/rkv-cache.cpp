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
#include <cstring>
#include <limits>
#include <stdexcept>

std::unique_ptr<rkv_cache> rkv_cache::create(llama_kv_cache & kv, uint32_t n_stream, const filter_cb & filter, const reuse_cb & reuse) {
    if (!rkv_pending_get() || rkv_pending_get()->taken) {
        return nullptr;
    }
    std::unique_ptr<rkv_cache> res(new rkv_cache(kv, n_stream, filter, reuse));
    rkv_pending_get()->taken = true;
    rkv_pending_get()->cache = res.get();
    return res;
}

rkv_cache::rkv_cache(llama_kv_cache & kv, uint32_t n_stream, const filter_cb & filter, const reuse_cb & reuse) :
        kv(kv), model(*rkv_pending_get()->model), n_stream(n_stream) {
    const rkv_pending & pending = *rkv_pending_get();

    params        = pending.params;
    layer_budgets = pending.layer_budgets;
    cparams       = std::make_unique<llama_cparams>(*pending.cparams);
    n_extra       = std::max(params.buffer, params.n_batch_seq);

    const int32_t n_layer = hparams().n_layer_all;
    for (int32_t il = 0; il < n_layer; ++il) {
        if (filter && !filter(il)) {
            continue;
        }
        if (hparams().has_kv(il)) {
            readers[il].insert(readers[il].begin(), il);
        } else if (reuse && reuse(il) >= 0) {
            readers[reuse(il)].push_back(il);
        }
    }
    if (readers.empty()) {
        rkv_refuse(hparams().swa_type != LLAMA_SWA_TYPE_NONE ?
            "every attention layer has a sliding window, whose cache is small as it is" : "no layer has a KV cache");
    }
    if (kv.swa_type != LLAMA_SWA_TYPE_NONE) {
        rkv_refuse("a sliding window without a cache of its own");
    }

    // groups, the widest first
    std::vector<uint32_t> budgets = layer_budgets;
    budgets.resize(n_layer, layer_budgets.empty() ? params.budget : layer_budgets.back());

    std::vector<uint32_t> sizes;
    for (const auto & [il, _] : readers) {
        sizes.push_back(budgets[il]);
    }
    std::sort(sizes.begin(), sizes.end(), std::greater<uint32_t>());
    sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
    for (const uint32_t size : sizes) {
        groups.push_back({ size, sizes.front() - size, 0 });
    }
    layer_group.assign(n_layer, 0);
    for (const auto & [il, _] : readers) {
        layer_group[il] = std::find(sizes.begin(), sizes.end(), budgets[il]) - sizes.begin();
    }
    n_budget_max = sizes.front();
    n_start      = groups.back().off;

    params.layer_budgets   = nullptr;
    params.n_layer_budgets = 0;

    streams.resize(n_stream);
    clear();
}

rkv_cache::~rkv_cache() {
    if (rkv_pending * pending = rkv_pending_get(); pending && pending->cache == this) {
        pending->cache = nullptr;
    }
}

void rkv_cache::add_layer(ggml_context * ctx, uint32_t il, ggml_tensor * k, ggml_tensor * v) {
    const llama_hparams & hp = hparams();

    layer_t l = {};
    l.il        = il;
    l.group     = group_of(il);
    l.readers   = readers.at(il);
    l.n_head    = hp.n_head(il)*l.readers.size();
    l.n_head_kv = hp.n_head_kv(il);
    l.n_embd_k  = hp.n_embd_head_k(il);
    l.n_embd_v  = hp.n_embd_head_v(il);
    l.k         = k;
    l.v         = v;

    if (l.n_head_kv < 1 || l.n_head < 1 || l.n_head % l.n_head_kv != 0) {
        rkv_refuse("layer " + std::to_string(il) + " has " + std::to_string(l.n_head) + " query heads for " +
            std::to_string(l.n_head_kv) + " KV heads");
    }
    l.op             = rkv_policy_op(params);
    l.op.layer       = il;
    l.op.n_head_kv   = l.n_head_kv;
    l.op.value_weight = l.v ? l.op.value_weight : 0.0f; // MLA: values are parts of the keys
    l.op.softcap     = hp.attn_soft_cap ? hp.f_attn_logit_softcapping : 0.0f;

    const int64_t n_aux = rkv_n_aux(&l.op), n_stats = rkv_n_stats(&l.op, l.n_embd_k);
    l.q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, (int64_t) l.n_embd_k*l.n_head, params.window + 1, n_stream);
    l.pos   = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, k->ne[1], l.n_head_kv, n_stream);
    l.aux   = n_aux   > 0 ? ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_aux, k->ne[1], l.n_head_kv, n_stream) : nullptr;
    l.stats = n_stats > 0 ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_stats, l.n_head, n_stream) : nullptr;
    ggml_format_name(l.q,   "rkv_q_l%d", il);
    ggml_format_name(l.pos, "rkv_pos_l%d", il);
    if (l.aux) {
        ggml_format_name(l.aux, "rkv_aux_l%d", il);
    }
    if (l.stats) {
        ggml_format_name(l.stats, "rkv_stats_l%d", il);
    }

    if (model.arch == LLM_ARCH_GROK) { // caps its logits in the graph, with a scale of its own
        l.op.softcap = hp.f_attn_logit_softcapping;
        l.scale_mul  = hp.f_attn_out_scale;
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
        std::vector<float> factors(r.rope.n_rot/2, 1.0f);
        if (r.factors && r.factors->data) { // a model that is only measured has no data: then the size is what is asked for
            ggml_backend_tensor_get(r.factors, factors.data(), 0, factors.size()*sizeof(float));
        }
        for (const int32_t i : r.still) {
            factors[i] = std::numeric_limits<float>::infinity();
        }
        rkv_rope rope = r.rope;
        rope.freq_factors = factors.data();
        // beyond the last position lie the queries to come
        const uint32_t ahead = params.policy == RKV_POLICY_TRIATTENTION ? 1u << (RKV_TRI_OFFSETS - 1) : 0;
        r.table = rkv_rope_table(rope, cparams->n_ctx_seq + ahead);
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
    if (cells(strm).get_used() > 0) {
        streams[strm].filled = true;
        return;
    }
    const int64_t pin = streams[strm].filled ? -1 : streams[strm].pin;
    streams[strm] = stream_t();
    streams[strm].pin = pin;
    streams[strm].ring.assign(params.window, -1);
}

//
// where things are
//

const llama_kv_cells & rkv_cache::cells(uint32_t strm) const { return kv.v_cells[strm]; }
bool rkv_cache::v_transposed() const { return kv.v_trans; }
const llama_hparams & rkv_cache::hparams() const { return kv.hparams; }

int32_t rkv_cache::owner(int32_t il) const {
    const auto it = kv.map_layer_ids.find(il);
    return it == kv.map_layer_ids.end() ? -1 : (int32_t) kv.layers[it->second].il;
}

void rkv_cache::refuse(const std::string & why) {
    if (why_not.empty()) {
        why_not = why;
    }
}

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
    const uint32_t limit = full_at(strm);
    return limit - std::min(limit, used_end(strm));
}

uint32_t rkv_cache::early_target(uint32_t strm) const {
    if (params.policy != RKV_POLICY_RPC || params.growth < 2) {
        return 0;
    }
    const uint64_t target = recent(groups.back()) + pin(strm) + ((uint64_t) streams[strm].passes + 1)*params.buffer/params.growth;
    return target < groups.back().budget ? target : 0;
}

uint32_t rkv_cache::full_at(uint32_t strm) const {
    const uint32_t standard = n_budget_max + params.buffer;
    const uint32_t target   = early_target(strm);
    if (target == 0) {
        return standard;
    }
    const uint32_t first = cells(strm).get_used() == 0 ? n_start : cells(strm).used_min();
    return std::min(standard, std::max(std::max(streams[strm].old_end, first + pin(strm)) + params.buffer, first + target + 1));
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
    if (slots == 0 && c.get_used() > 0) { // all of the window was removed and nothing came after it: the removed tokens' queries judge
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
        if ((seq_id != -1 && stream_of(seq_id) != s) || cells(s).get_used() == 0) {
            continue;
        }
        streams[s].filled = true;
        if (!streams[s].compacted) {
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

bool rkv_cache::window_reaches(const llama_kv_cache & window, llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    for (uint32_t s = 0; s < n_stream; ++s) {
        if (seq_id != -1 && stream_of(seq_id) != s) {
            continue;
        }
        const llama_kv_cells & c = window.v_cells[s];
        const llama_pos last = c.seq_pos_max(s);
        if (p0 <= 0 || p0 > last || (p1 >= 0 && p1 <= last)) {
            continue; // all of it, nothing, or a middle part: what comes next sees what it would have seen
        }
        llama_pos first = p0;
        while (first > 0 && !llama_hparams::is_masked_swa(window.n_swa, window.swa_type, first - 1, p0)) {
            --first;
        }
        llama_pos n = 0;
        for (uint32_t i = 0; i < c.size(); ++i) {
            n += !c.is_empty(i) && c.seq_has(i, s) && c.pos_get(i) >= first && c.pos_get(i) < p0;
        }
        if (n < p0 - first) {
            return rkv_set_error("the attention window before position %d of sequence %u is gone: remove the whole sequence", p0, s);
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
            streams[s].filled = true;
            kv.v_cells[s].reset();
            reset_if_empty(s);
        }
    }
    return true;
}

void rkv_cache::copy_stream(uint32_t src, uint32_t dst) {
    for (const auto & l : layers) {
        for (ggml_tensor * t : { l.q, l.pos, l.aux, l.stats }) {
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

static bool rkv_is_text(const llama_ubatch & ubatch, uint32_t i) {
    const uint32_t n = ubatch.n_tokens;
    return ubatch.pos[i] == ubatch.pos[n + i] && ubatch.pos[i] == ubatch.pos[2*n + i] &&
        (i == 0 || ubatch.seq_id[i][0] != ubatch.seq_id[i - 1][0] || ubatch.pos[i] > ubatch.pos[i - 1]);
}

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
            // An image under M-RoPE: tokens that share a position, or lie in two dimensions.
            if (ubatch.is_pos_2d() && ubatch.embd && !rkv_is_text(ubatch, i)) {
                LLAMA_LOG_ERROR("%s: M-RoPE positions of an image are not supported in a cache with a budget\n", __func__);
                return rkv_set_error("token %u has the positions of an image (M-RoPE): a cache with a budget takes text only", i);
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
            return used_end(s) >= full_at(s) || used_end(s) + n_new[s] > n_cells();
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
        st.bytes_kv += ggml_nbytes(l.k) + (l.v ? ggml_nbytes(l.v) : 0);
        st.bytes    += ggml_nbytes(l.q) + ggml_nbytes(l.pos) + (l.aux ? ggml_nbytes(l.aux) : 0) +
            (l.stats ? ggml_nbytes(l.stats) : 0);
    }
    st.bytes          += st.bytes_kv;
    st.compactions     = n_compactions;
    st.t_compaction_us = t_us;
    st.tokens_evicted  = (uint64_t) n_evicted;
    return st;
}

bool rkv_cache::all_unrotatable() const {
    return std::all_of(layers.begin(), layers.end(), [](const layer_t & l) { return l.unrotatable; });
}

bool rkv_cache::all_values() const {
    return std::all_of(layers.begin(), layers.end(), [](const layer_t & l) { return l.v != nullptr; });
}

bool rkv_cache::set_pin(llama_seq_id seq_id, uint32_t n) {
    const int64_t s = stream_of(seq_id);
    if (s < 0) {
        return rkv_set_error("there is no sequence %d: the context has %u", seq_id, n_stream);
    }
    const uint32_t most = groups.back().budget - recent(groups.back()) - 1;
    if (n > most) {
        return rkv_set_error("%u pinned cells leave no room in a budget of %u beside the %u most recent ones: at most %u", n,
            groups.back().budget, recent(groups.back()), most);
    }
    const bool empty = cells(s).get_used() == 0;
    if (empty) {
        streams[s].filled = true; // what was there before
        reset_if_empty(s);
    } else if (streams[s].compacted && n > pin(s)) {
        return rkv_set_error("sequence %d was compacted with %u pinned cells: of %u tokens some may be gone", seq_id, pin(s), n);
    }
    streams[s].pin    = n;
    streams[s].filled = !empty;
    return true;
}

bool rkv_cache::all_captured() const {
    return std::all_of(layers.begin(), layers.end(), [](const layer_t & l) { return l.captured; });
}

//
// RoPE, as the graph applies it
//

namespace {

struct rope_site {
    const ggml_tensor * node = nullptr;
    int64_t begin = 0;  // first rotated element of a head
    bool    last  = true; // nothing but moving elements comes after it
};

// Back from the cached keys to where they are rotated.
void find_rope(const ggml_tensor * t, const ggml_tensor * k_rot, int64_t n_embd, int64_t begin, bool last, rope_site & site) {
    while (t) {
        switch (t->op) {
            case GGML_OP_ROPE:
                if (site.node) {
                    site.last = false; // two of them
                    return;
                }
                site = { t, begin + t->op_params[15], last }; // ggml_rope_set_offset
                return;
            case GGML_OP_VIEW:
                last = last && (t->ne[0] == t->src[0]->ne[0] || (t->view_offs == t->src[0]->view_offs && ggml_is_contiguous(t->src[0])));
                t = t->src[0];
                break;
            case GGML_OP_RESHAPE: case GGML_OP_CONT: case GGML_OP_PERMUTE: case GGML_OP_TRANSPOSE: case GGML_OP_CPY: case GGML_OP_DUP:
            case GGML_OP_REPEAT:
                t = t->src[0];
                break;
            case GGML_OP_CONCAT:
                find_rope(t->src[0], k_rot, n_embd, begin, last && t->op_params[0] == 0, site);
                find_rope(t->src[1], k_rot, n_embd, begin + (t->op_params[0] == 0 ? t->src[0]->ne[0] : 0), last && t->op_params[0] == 0, site);
                return;
            case GGML_OP_MUL_MAT:
                if (t->src[0] != k_rot) {
                    return; // the projection
                }
                t = t->src[1];
                break;
            case GGML_OP_RMS_NORM: case GGML_OP_L2_NORM: // one factor per head leaves directions as they are
                last = last && t->ne[0] == n_embd;
                t = t->src[0];
                break;
            case GGML_OP_SCALE:
                t = t->src[0];
                break;
            case GGML_OP_NORM: case GGML_OP_GROUP_NORM: case GGML_OP_MUL: case GGML_OP_DIV: case GGML_OP_ADD: case GGML_OP_SUB:
            case GGML_OP_CLAMP: case GGML_OP_UNARY:
                last = false;
                t = t->src[0];
                break;
            default:
                return;
        }
    }
}

} // namespace

void rkv_cache::set_rope(layer_t & l, const ggml_tensor * k_cur, const ggml_tensor * k_rot) {
    l.op.n_hadamard = k_rot ? (int32_t) k_rot->ne[0] : 0;
    l.op.n_rot      = 0;
    l.rope          = -1;

    rope_site site;
    find_rope(k_cur, k_rot, l.n_embd_k, 0, true, site);
    l.unrotatable = k_cur && site.last;
    if (!site.node) {
        return;
    }
    rope_t r = {};
    const int32_t * p = site.node->op_params; // as ggml_rope_impl writes them
    const int32_t mode = p[2];
    const auto number = [p](int i) { float x; memcpy(&x, p + i, sizeof(x)); return x; };
    r.rope    = { p[1], p[4], number(5), number(6), number(7), number(8), number(9), number(10), nullptr };
    r.factors = site.node->src[2];
    if (mode == GGML_ROPE_TYPE_VISION || site.begin + r.rope.n_rot > l.n_embd_k) {
        l.unrotatable = false;
        return;
    }
    if (mode & GGML_ROPE_TYPE_MROPE) { // of a text token the first three positions are equal, the fourth is 0
        const int32_t * sect = p + 11;
        const int32_t   all  = sect[0] + sect[1] + sect[2] + sect[3];
        for (int32_t i = 0; i < r.rope.n_rot/2 && all > 0; ++i) {
            const int32_t s = i % all;
            if (mode == GGML_ROPE_TYPE_IMROPE ? s >= 3*sect[s % 3] : s >= all - sect[3]) {
                r.still.push_back(i);
            }
        }
    }
    const auto same = [&r](const rope_t & o) {
        const rkv_rope & a = o.rope, & b = r.rope;
        return a.n_rot == b.n_rot && a.n_ctx_orig == b.n_ctx_orig && a.freq_base == b.freq_base && a.freq_scale == b.freq_scale &&
            a.ext_factor == b.ext_factor && a.attn_factor == b.attn_factor && a.beta_fast == b.beta_fast && a.beta_slow == b.beta_slow &&
            o.factors == r.factors && o.still == r.still;
    };
    auto it = std::find_if(ropes.begin(), ropes.end(), same);
    if (it == ropes.end()) {
        it = ropes.insert(ropes.end(), r);
    }
    l.rope           = it - ropes.begin();
    l.op.n_rot       = r.rope.n_rot;
    l.op.rope_begin  = site.begin;
    l.op.flags       = (l.op.flags & ~RKV_FLAG_ROPE_NEOX) | (mode == GGML_ROPE_TYPE_NORMAL ? 0 : RKV_FLAG_ROPE_NEOX);
    l.op.rope_mscale = rkv_rope_mscale(r.rope.freq_scale, r.rope.ext_factor, r.rope.attn_factor);
}
