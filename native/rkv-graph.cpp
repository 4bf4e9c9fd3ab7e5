#include "rkv-graph.h"
#include "rkv-cache.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

void rkv_build_inputs(ggml_context * ctx, const llama_ubatch & ubatch, llm_graph_input_attn_kv & inp) {
    const rkv_cache * rkv = inp.mctx->get_kv()->rkv.get();
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

    inp.rkv.groups.resize(rkv->groups.size());
    for (size_t g = 1; g < rkv->groups.size(); ++g) {
        const int64_t off = rkv->groups[g].off;
        const ggml_tensor * mask = inp.self_kq_mask;
        rkv_group_inputs & in = inp.rkv.groups[g];
        in.k_idxs  = input(inp.self_k_idxs->ne[0], "rkv_inp_k_idxs");
        in.v_idxs  = input(inp.self_v_idxs->ne[0], "rkv_inp_v_idxs");
        in.kq_mask = ggml_cont(ctx, ggml_view_4d(ctx, inp.self_kq_mask, mask->ne[0] - off, mask->ne[1], mask->ne[2], mask->ne[3],
            mask->nb[1], mask->nb[2], mask->nb[3], off*mask->nb[0]));
    }
}

void rkv_set_inputs(const llama_ubatch * ubatch, llm_graph_input_attn_kv & inp) {
    llama_kv_cache * kv = inp.mctx->get_kv();
    if (!kv->rkv || !inp.rkv.q_idxs || !inp.rkv.q_idxs->buffer) {
        return;
    }
    rkv_cache & rkv   = *kv->rkv;
    const auto & sinfo = inp.mctx->get_sinfo();
    const int64_t window = rkv.get_params().window;

    // the last `window` tokens of each stream are kept, the rest goes to the trash row
    int64_t * rows = (int64_t *) inp.rkv.q_idxs->data;
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
        const rkv_group_inputs & in = inp.rkv.groups[g];
        if (!in.k_idxs->buffer) {
            continue; // no layer of this group has a cache
        }
        const auto & l = rkv.layers[rkv.groups[g].layer];
        const int64_t off     = rkv.groups[g].off;
        const int64_t n_cells = l.k->ne[1];
        const int64_t n_embd  = l.v->ne[0];
        int64_t * k_idxs = (int64_t *) in.k_idxs->data;
        int64_t * v_idxs = (int64_t *) in.v_idxs->data;
        for (size_t s = 0; s < sinfo.n_stream(); ++s) {
            for (size_t i = 0; i < sinfo.size(); ++i) {
                const size_t  t   = s*sinfo.size() + i;
                const int64_t row = sinfo.idxs[s][i] - off;
                k_idxs[t] = sinfo.strm[s]*n_cells + row;
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

rkv_group_inputs rkv_layer_inputs(const llm_graph_input_attn_kv & inp, int il) {
    const rkv_cache * rkv = inp.mctx->get_kv()->rkv.get();
    if (!rkv || rkv->group_of(il) == 0) {
        return { inp.get_k_idxs(), inp.self_v_idxs, inp.get_kq_mask() };
    }
    return inp.rkv.groups[rkv->group_of(il)];
}

void rkv_capture(ggml_context * ctx, ggml_cgraph * gf, const llm_graph_input_attn_kv & inp, ggml_tensor * q_cur,
        float kq_scale, int il) {
    rkv_cache * rkv = inp.mctx->get_kv()->rkv.get();
    if (!rkv) {
        return;
    }
    rkv_cache::layer_t * layer = rkv->find_layer(il);
    if (!layer) {
        return;
    }
    layer->op.scale = kq_scale*layer->scale_mul;
    const char * no_capture = getenv("RKV_BENCH_NO_CAPTURE"); // scripts/gpu_bench.py measures what capture costs
    if (no_capture && strcmp(no_capture, "1") == 0) {
        LLAMA_LOG_WARN("%s: RKV_BENCH_NO_CAPTURE is set: what is kept means nothing\n", __func__);
        layer->captured = true;
        return;
    }
    const int64_t n_row = q_cur->ne[0]*q_cur->ne[1];
    ggml_tensor * q = ggml_row_size(q_cur->type, q_cur->ne[0]) == q_cur->nb[1] ?
        ggml_view_2d(ctx, q_cur, n_row, q_cur->ne[2], q_cur->nb[2], 0) :
        ggml_cont_2d(ctx, q_cur, n_row, q_cur->ne[2]);
    ggml_tensor * ring = ggml_reshape_2d(ctx, layer->q, n_row, layer->q->ne[1]*layer->q->ne[2]);
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, ring, q, inp.rkv.q_idxs));
    layer->captured = true;
}
