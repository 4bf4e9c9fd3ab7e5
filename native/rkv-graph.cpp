#include "rkv-graph.h"
#include "rkv-cache.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

//
// what the input classes have in common
//

static const llama_kv_cache_context * base_of(const llama_kv_cache_context      * mctx) { return mctx; }
static const llama_kv_cache_context * base_of(const llama_kv_cache_iswa_context * mctx) { return mctx->get_base(); }

static rkv_group_inputs own_inputs(const llm_graph_input_attn_kv & inp, int) {
    return { inp.self_k_idxs, inp.self_v_idxs, inp.self_kq_mask };
}

static rkv_group_inputs own_inputs(const llm_graph_input_attn_k & inp, int) {
    return { inp.self_k_idxs, nullptr, inp.self_kq_mask };
}

static bool is_window(const llm_graph_input_attn_kv &, int) { return false; }
static bool is_window(const llm_graph_input_attn_k  &, int) { return false; }
template <typename I> static bool is_window(const I & inp, int il) { return il >= 0 && inp.hparams.is_swa(il); }

static rkv_group_inputs own_inputs(const llm_graph_input_attn_kv_iswa & inp, int il) {
    if (is_window(inp, il)) {
        return { inp.self_k_idxs_swa, inp.self_v_idxs_swa, inp.self_kq_mask_swa };
    }
    return { inp.self_k_idxs, inp.self_v_idxs, inp.self_kq_mask };
}

static rkv_group_inputs own_inputs(const llm_graph_input_attn_k_iswa & inp, int il) {
    if (is_window(inp, il)) {
        return { inp.self_k_idxs_swa, nullptr, inp.self_kq_mask_swa };
    }
    return { inp.self_k_idxs, nullptr, inp.self_kq_mask };
}

static ggml_tensor * rotation(const llm_graph_input_attn_k &) { return nullptr; }
template <typename I> static ggml_tensor * rotation(const I & inp) { return inp.self_k_rot; }
static ggml_tensor * rotation_v(const llm_graph_input_attn_k &) { return nullptr; }
static ggml_tensor * rotation_v(const llm_graph_input_attn_k_iswa &) { return nullptr; }
template <typename I> static ggml_tensor * rotation_v(const I & inp) { return inp.self_v_rot; }

//
// inputs
//

template <typename I> void rkv_build_inputs(ggml_context * ctx, const llama_ubatch & ubatch, I & inp) {
    const rkv_cache * rkv = base_of(inp.mctx)->get_kv()->rkv.get();
    if (!rkv) {
        return;
    }
    const auto input = [&](int64_t n, const char * name) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        ggml_set_input(t);
        ggml_set_name(t, name);
        return t;
    };
    inp.rkv.q_idxs = input(ubatch.n_tokens, "rkv_inp_q_idxs");

    const rkv_group_inputs own = own_inputs(inp, -1);
    inp.rkv.groups.resize(rkv->groups.size());
    for (size_t g = 1; g < rkv->groups.size(); ++g) {
        const int64_t off = rkv->groups[g].off;
        ggml_tensor * mask = own.kq_mask;
        rkv_group_inputs & in = inp.rkv.groups[g];
        in.k_idxs  = input(own.k_idxs->ne[0], "rkv_inp_k_idxs");
        in.v_idxs  = own.v_idxs ? input(own.v_idxs->ne[0], "rkv_inp_v_idxs") : nullptr;
        in.kq_mask = ggml_cont(ctx, ggml_view_4d(ctx, mask, mask->ne[0] - off, mask->ne[1], mask->ne[2], mask->ne[3],
            mask->nb[1], mask->nb[2], mask->nb[3], off*mask->nb[0]));
    }
}

static void set_inputs(const llama_ubatch * ubatch, rkv_graph_inputs & inp, const llama_kv_cache_context * mctx) {
    llama_kv_cache * kv = mctx->get_kv();
    if (!kv->rkv || !inp.q_idxs || !inp.q_idxs->buffer) {
        return;
    }
    rkv_cache & rkv   = *kv->rkv;
    const auto & sinfo = mctx->get_sinfo();
    const int64_t window = rkv.get_params().window;

    // the last `window` tokens of each stream are kept, the rest goes to the trash row
    int64_t * rows = (int64_t *) inp.q_idxs->data;
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        auto & ring = rkv.streams[sinfo.strm[s]].ring;
        for (size_t i = 0; i < sinfo.size(); ++i) {
            const size_t    t    = s*sinfo.size() + i;
            const llama_pos pos  = ubatch->pos[t];
            const bool      keep = i + window >= sinfo.size();
            rows[t] = sinfo.strm[s]*(window + 1) + (keep ? pos % window : window);
            if (keep) {
                ring[pos % window] = pos;
            }
        }
    }

    for (size_t g = 1; g < rkv.groups.size(); ++g) {
        const rkv_group_inputs & in = inp.groups[g];
        if (!in.k_idxs->buffer) {
            continue; // no layer of this group has a cache
        }
        const auto & l = rkv.layers[rkv.groups[g].layer];
        const int64_t off     = rkv.groups[g].off;
        const int64_t n_cells = l.k->ne[1];
        const int64_t n_embd  = l.v ? l.v->ne[0] : 0;
        int64_t * k_idxs = (int64_t *) in.k_idxs->data;
        int64_t * v_idxs = in.v_idxs ? (int64_t *) in.v_idxs->data : nullptr;
        for (size_t s = 0; s < sinfo.n_stream(); ++s) {
            for (size_t i = 0; i < sinfo.size(); ++i) {
                const size_t  t   = s*sinfo.size() + i;
                const int64_t row = sinfo.idxs[s][i] - off;
                k_idxs[t] = sinfo.strm[s]*n_cells + row;
                if (!v_idxs) {
                    continue;
                }
                if (!rkv.v_transposed()) {
                    v_idxs[t] = k_idxs[t];
                    continue;
                }
                for (int64_t j = 0; j < n_embd; ++j) {
                    v_idxs[t*n_embd + j] = (sinfo.strm[s]*n_embd + j)*n_cells + row;
                }
            }
        }
    }
}

template <typename I, typename M> void rkv_set_inputs(const llama_ubatch * ubatch, I & inp, const M * mctx) {
    set_inputs(ubatch, inp.rkv, base_of(mctx));
}

//
// attention
//

// the queries of the last tokens go into the layer's ring
static void capture(ggml_context * ctx, ggml_cgraph * gf, rkv_cache & rkv, ggml_tensor * q_idxs, const rkv_attn & attn, ggml_tensor * k_rot,
        ggml_tensor * v_rot) {
    rkv_cache::layer_t * layer = rkv.find_layer(rkv.owner(attn.il));
    const std::string    name  = "layer " + std::to_string(attn.il);
    if (!layer) {
        rkv.refuse(name + " reads cells that the cache does not know");
        return;
    }
    const int64_t n_reader = layer->readers.size();
    const int64_t reader   = std::find(layer->readers.begin(), layer->readers.end(), attn.il) - layer->readers.begin();
    const int64_t n_head   = layer->n_head/n_reader;
    if (attn.kq_b) {
        rkv.refuse(name + " adds a bias to its attention");
    }
    if (attn.sinks && (n_reader > 1 || attn.sinks->type != GGML_TYPE_F32 || ggml_nelements(attn.sinks) != n_head)) {
        rkv.refuse(name + " has attention sinks of an unknown kind");
    }
    if (reader == n_reader || attn.q->ne[0] != layer->n_embd_k || attn.q->ne[1] != n_head || attn.q->type != GGML_TYPE_F32) {
        rkv.refuse(name + " has queries of an unknown shape");
        return;
    }
    const float scale = attn.scale*layer->scale_mul;
    if (reader == 0) {
        layer->op.scale = scale;
        layer->sinks    = attn.sinks;
        rkv.set_rope(*layer, attn.k, k_rot);
        layer->op.n_hadamard_v = v_rot ? (int32_t) v_rot->ne[0] : 0;
    }
    const char * no_capture = getenv("RKV_BENCH_NO_CAPTURE"); // scripts/gpu_bench.py measures what capture costs
    if (no_capture && strcmp(no_capture, "1") == 0) {
        LLAMA_LOG_WARN("%s: RKV_BENCH_NO_CAPTURE is set: what is kept means nothing\n", __func__);
        layer->captured = true;
        return;
    }
    ggml_tensor * q = attn.q;
    const int64_t n_tokens = q->ne[2];
    const int64_t n_ring   = layer->q->ne[1]*layer->q->ne[2];
    if (n_reader == 1) {
        const int64_t n_row = q->ne[0]*q->ne[1];
        q = ggml_row_size(q->type, q->ne[0]) == q->nb[1] ?
            ggml_view_2d(ctx, q, n_row, n_tokens, q->nb[2], 0) : ggml_cont_2d(ctx, q, n_row, n_tokens);
        ggml_tensor * ring = ggml_reshape_2d(ctx, layer->q, n_row, n_ring);
        ggml_build_forward_expand(gf, ggml_set_rows(ctx, ring, q, q_idxs));
    } else { // beside the other readers' queries of the same KV head
        if (scale != layer->op.scale) {
            q = ggml_scale(ctx, ggml_cont(ctx, q), scale/layer->op.scale);
        }
        const int64_t n_part = layer->n_embd_k*n_head/layer->n_head_kv;
        const size_t  part   = n_part*sizeof(float);
        q = ggml_cont_3d(ctx, q, n_part, layer->n_head_kv, n_tokens);
        q = ggml_permute(ctx, q, 0, 2, 1, 3);
        ggml_tensor * ring = ggml_view_3d(ctx, layer->q, n_part, n_ring, layer->n_head_kv, layer->q->nb[1], part*n_reader, part*reader);
        ggml_build_forward_expand(gf, ggml_set_rows(ctx, ring, q, q_idxs));
    }
    layer->captured = layer->captured || reader == 0;
}

template <typename I> rkv_group_inputs rkv_build_attn(ggml_context * ctx, ggml_cgraph * gf, const I & inp, const rkv_attn & attn) {
    const rkv_group_inputs own = own_inputs(inp, attn.il);
    rkv_cache * rkv = is_window(inp, attn.il) ? nullptr : base_of(inp.mctx)->get_kv()->rkv.get();
    if (!rkv) {
        return own;
    }
    capture(ctx, gf, *rkv, inp.rkv.q_idxs, attn, rotation(inp), rotation_v(inp));
    const uint32_t group = rkv->group_of(std::max(0, rkv->owner(attn.il)));
    return group == 0 ? own : inp.rkv.groups[group];
}

#define RKV_INPUTS(I, M) \
    template void rkv_build_inputs<I>(ggml_context *, const llama_ubatch &, I &); \
    template void rkv_set_inputs<I, M>(const llama_ubatch *, I &, const M *); \
    template rkv_group_inputs rkv_build_attn<I>(ggml_context *, ggml_cgraph *, const I &, const rkv_attn &);

RKV_INPUTS(llm_graph_input_attn_kv,      llama_kv_cache_context)
RKV_INPUTS(llm_graph_input_attn_k,       llama_kv_cache_context)
RKV_INPUTS(llm_graph_input_attn_kv_iswa, llama_kv_cache_iswa_context)
RKV_INPUTS(llm_graph_input_attn_k_iswa,  llama_kv_cache_iswa_context)
