// The C API: what a context holds. Creation is in rkv-init.cpp, the stand-alone selection in rkv-select.cpp.

#include "rkv-cache.h"
#include "rkv-init.h"
#include "rkv-memory.h"
#include "rkv-unrotate.h"

#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>

int32_t rkv_version() { return RKV_VERSION; }

const char * rkv_build_info() { return "llama-cpp-python " RKV_LLAMA_CPP_PYTHON_VERSION ", llama.cpp " RKV_LLAMA_CPP_COMMIT; }

const char * rkv_policy_name(int32_t policy) {
    static const char * const names[RKV_POLICY_COUNT] = { "none", "rkv", "snapkv", "streaming", "latest", "h2o", "gkv", "rpc",
        "chunkkv", "value-aware", "keydiff", "lagkv", "triattention", "given" };
    return policy >= 0 && policy < RKV_POLICY_COUNT ? names[policy] : nullptr;
}

rkv_stats rkv_get_stats(const llama_context * ctx) {
    rkv_stats st = {};
    if (!ctx || !ctx->get_memory()) {
        return st;
    }
    const auto size_of = [](const llama_memory_i & memory) {
        uint64_t all = 0;
        for (const auto & [_, size] : memory.memory_breakdown()) {
            all += size;
        }
        return all;
    };
    const uint64_t all = size_of(*ctx->get_memory());
    const llama_kv_cache * kv = rkv_attention_cache(ctx->get_memory());
    if (!kv) {
        st.bytes = all;
        return st;
    }
    const uint64_t own = size_of(*kv);
    if (const rkv_cache * rkv = rkv_cache_of(ctx)) {
        st = rkv->stats();
    } else {
        st.cells = kv->get_size();
        st.bytes = st.bytes_kv = own;
    }
    st.bytes += all - own; // windows, recurrent states
    return st;
}

int32_t rkv_seq_used(const llama_context * ctx, llama_seq_id seq_id) {
    if (const rkv_cache * rkv = rkv_cache_of(ctx)) {
        return rkv->seq_used(seq_id);
    }
    const llama_kv_cache * kv = ctx ? rkv_attention_cache(ctx->get_memory()) : nullptr;
    if (!kv || seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max()) {
        return -1;
    }
    return kv->get_cells(seq_id).get_used();
}

int32_t rkv_seq_room(const llama_context * ctx, llama_seq_id seq_id) {
    const rkv_cache * rkv = rkv_cache_of(ctx);
    return rkv ? rkv->seq_room(seq_id) : -1;
}

bool rkv_seq_compact(llama_context * ctx, llama_seq_id seq_id) {
    rkv_cache * rkv = rkv_cache_of(ctx);
    if (!rkv) {
        return rkv_set_error("the context has no budget");
    }
    llama_synchronize(ctx);
    ctx->memory_update(false); // copies that are still pending
    return rkv->compact_now(seq_id);
}

bool rkv_seq_pin(llama_context * ctx, llama_seq_id seq_id, uint32_t n) {
    rkv_cache * rkv = rkv_cache_of(ctx);
    return rkv ? rkv->set_pin(seq_id, n) : rkv_set_error("the context has no budget");
}

//
// what a head holds
//

namespace {

struct head_view {
    rkv_cache                * rkv;
    const rkv_cache::layer_t * layer;
    uint32_t strm = 0;
    rkv_cache::range_t rows = {};
    int32_t n() const { return rows.end - rows.begin; }
};

bool head_of(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, head_view & view) {
    view.rkv = rkv_cache_of(ctx);
    if (!view.rkv) {
        return rkv_set_error("the context has no budget");
    }
    view.layer = view.rkv->find_layer(il);
    if (!view.layer) {
        return rkv_set_error("there is no layer %d with a KV cache", il);
    }
    if (head < 0 || head >= view.layer->n_head_kv) {
        return rkv_set_error("there is no KV head %d: layer %d has %d", head, il, view.layer->n_head_kv);
    }
    const int64_t strm = view.rkv->stream_of(seq_id);
    if (strm < 0) {
        return rkv_set_error("there is no sequence %d", seq_id);
    }
    llama_synchronize(ctx);
    ctx->memory_update(false);
    view.strm = strm;
    if (!view.rkv->close_holes(strm)) {
        return false;
    }
    view.rows = view.rkv->range(*view.layer, strm);
    return true;
}

bool fits(const head_view & view, size_t n_max) {
    return (size_t) view.n() <= n_max || rkv_set_error("room for %zu cells, %d are held", n_max, view.n());
}

void to_float(ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

// rows of one head, dequantised
void read_rows(const head_view & v, ggml_tensor * t, int32_t head, int64_t n_embd, bool transposed, float * dst) {
    const uint32_t n = v.n();
    if (n == 0) {
        return;
    }
    if (!transposed) {
        const size_t unit = ggml_row_size(t->type, n_embd);
        std::vector<uint8_t> raw(n*t->nb[1]);
        ggml_backend_tensor_get(t, raw.data(), v.strm*t->nb[2] + v.rows.begin*t->nb[1], raw.size());
        for (uint32_t i = 0; i < n; ++i) {
            to_float(t->type, raw.data() + i*t->nb[1] + head*unit, dst + i*n_embd, n_embd);
        }
        return;
    }
    const size_t el = ggml_type_size(t->type);
    std::vector<uint8_t> raw(n*el);
    std::vector<float>   col(n);
    for (int64_t j = 0; j < n_embd; ++j) {
        ggml_backend_tensor_get(t, raw.data(), v.strm*t->nb[2] + ((head*n_embd + j)*t->ne[1] + v.rows.begin)*el, raw.size());
        to_float(t->type, raw.data(), col.data(), n);
        for (uint32_t i = 0; i < n; ++i) {
            dst[i*n_embd + j] = col[i];
        }
    }
}

std::vector<int32_t> positions(const head_view & v, int32_t head) {
    std::vector<int32_t> res(v.n());
    const uint32_t n_old = v.rows.old_end - v.rows.begin;
    const ggml_tensor * t = v.layer->pos;
    if (n_old > 0) {
        ggml_backend_tensor_get(t, res.data(), v.strm*t->nb[2] + head*t->nb[1] + v.rows.begin*sizeof(int32_t), n_old*sizeof(int32_t));
    }
    const auto &   cells = v.rkv->cells(v.strm);
    const uint32_t off   = v.rkv->groups[v.layer->group].off;
    for (uint32_t i = n_old; i < res.size(); ++i) {
        res[i] = cells.pos_get(v.rows.begin + i + off);
    }
    return res;
}

} // namespace

int32_t rkv_get_positions(llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head, int32_t * dst, size_t n_max) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, head, v)) {
        return -1;
    }
    if (dst) {
        if (!fits(v, n_max)) {
            return -1;
        }
        const auto pos = positions(v, head);
        std::copy(pos.begin(), pos.end(), dst);
    }
    return v.n();
}

int32_t rkv_get_keys(llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head, float * dst, size_t n_max) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, head, v)) {
        return -1;
    }
    if (dst) {
        if (!fits(v, n_max)) {
            return -1;
        }
        read_rows(v, v.layer->k, head, v.layer->n_embd_k, false, dst);
    }
    return v.n();
}

int32_t rkv_get_keys_unrotated(llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head, float * dst, size_t n_max) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, head, v)) {
        return -1;
    }
    if (!v.layer->unrotatable) {
        rkv_set_error("layer %d changes its keys after RoPE, which cannot be undone", layer);
        return -1;
    }
    const int32_t n = rkv_get_keys(ctx, seq_id, layer, head, dst, n_max);
    if (n <= 0 || !dst) {
        return n;
    }
    const auto    pos    = positions(v, head);
    const int32_t n_embd = v.layer->n_embd_k;
    const auto    op     = v.layer->op;
    const auto *  table  = v.rkv->rope_table(*v.layer);
    for (int32_t i = 0; i < n; ++i) {
        rkv_undo_rotation(op, dst + (size_t) i*n_embd, n_embd, pos[i], table ? table->data() : nullptr, op.n_rot);
    }
    return n;
}

int32_t rkv_get_values(llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head, float * dst, size_t n_max) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, head, v)) {
        return -1;
    }
    if (dst) {
        if (!fits(v, n_max)) {
            return -1;
        }
        if (v.layer->v) {
            read_rows(v, v.layer->v, head, v.layer->n_embd_v, v.rkv->v_transposed(), dst);
        } else { // MLA: the first elements of K
            const int64_t n_k = v.layer->n_embd_k, n_v = v.layer->n_embd_v;
            std::vector<float> k((size_t) v.n()*n_k);
            read_rows(v, v.layer->k, head, n_k, false, k.data());
            for (int32_t i = 0; i < v.n(); ++i) {
                std::copy_n(k.data() + i*n_k, n_v, dst + i*n_v);
            }
        }
    }
    return v.n();
}

int32_t rkv_get_scores(llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head, int32_t slot, float * dst, size_t n_max) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, head, v)) {
        return -1;
    }
    const ggml_tensor * t = v.layer->aux;
    if (!t || slot < 0 || slot >= t->ne[0]) {
        rkv_set_error("the policy stores no float %d", slot);
        return -1;
    }
    if (dst) {
        if (!fits(v, n_max)) {
            return -1;
        }
        std::vector<float> raw((size_t) v.n()*t->ne[0]);
        ggml_backend_tensor_get(t, raw.data(), v.strm*t->nb[3] + head*t->nb[2] + v.rows.begin*t->nb[1], raw.size()*sizeof(float));
        for (int32_t i = 0; i < v.n(); ++i) {
            // what came after the last compaction has no score yet
            dst[i] = v.rows.begin + i < v.rows.old_end ? raw[i*t->ne[0] + slot] : -1.0f;
        }
    }
    return v.n();
}

bool rkv_seq_set_scores(llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head, const float * z, size_t n) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, head, v)) {
        return false;
    }
    if (v.rkv->get_params().policy != RKV_POLICY_GIVEN) {
        return rkv_set_error("scores are given to the policy given, not to %s", rkv_policy_name(v.rkv->get_params().policy));
    }
    if (!z || n > (size_t) v.n()) {
        return rkv_set_error("%zu scores for %d cells", n, v.n());
    }
    v.rkv->streams[v.strm].given[{ layer, head }].assign(z, z + n);
    return true;
}

int32_t rkv_get_queries(llama_context * ctx, llama_seq_id seq_id, int32_t layer, float * dst, size_t n_max) {
    head_view v;
    if (!head_of(ctx, seq_id, layer, 0, v)) {
        return -1;
    }
    // slots of the window, oldest position first
    const uint64_t slots = v.rkv->window_slots(v.strm);
    const auto &   ring  = v.rkv->streams[v.strm].ring;
    std::vector<std::pair<llama_pos, uint32_t>> order;
    for (uint32_t s = 0; s < ring.size(); ++s) {
        if (slots >> s & 1) {
            order.emplace_back(ring[s], s);
        }
    }
    std::sort(order.begin(), order.end());
    if (dst) {
        if (order.size() > n_max) {
            rkv_set_error("room for %zu queries, %zu are held", n_max, order.size());
            return -1;
        }
        const ggml_tensor * t = v.layer->q;
        for (size_t i = 0; i < order.size(); ++i) {
            ggml_backend_tensor_get(t, dst + i*t->ne[0], v.strm*t->nb[2] + order[i].second*t->nb[1], t->nb[1]);
        }
    }
    return order.size();
}

float rkv_get_attn_scale(const llama_context * ctx, int32_t layer) {
    const rkv_cache * rkv = rkv_cache_of(ctx);
    const auto * l = rkv ? rkv->find_layer(layer) : nullptr;
    return l ? l->op.scale : 0.0f;
}

bool rkv_get_layer(const llama_context * ctx, int32_t layer, rkv_layer * dst) {
    const rkv_cache * rkv = rkv_cache_of(ctx);
    const auto * l = rkv ? rkv->find_layer(layer) : nullptr;
    if (!l || !dst) {
        return rkv_set_error("there is no layer %d with a KV cache under a budget", layer);
    }
    *dst = {};
    dst->n_head        = l->n_head;
    dst->n_readers     = l->readers.size();
    dst->n_head_kv     = l->n_head_kv;
    dst->n_embd_head_k = l->n_embd_k;
    dst->n_embd_head_v = l->n_embd_v;
    dst->n_rot         = l->op.n_rot;
    dst->rope_begin    = l->op.rope_begin;
    dst->budget        = rkv->groups[l->group].budget;
    dst->scale         = l->op.scale;
    dst->softcap       = l->op.softcap;
    dst->has_sinks     = l->sinks != nullptr;
    dst->v_in_k        = l->v == nullptr;
    dst->unrotatable   = l->unrotatable;
    return true;
}
