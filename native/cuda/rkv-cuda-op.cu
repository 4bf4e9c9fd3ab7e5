// GGML_OP_RKV on the CUDA backend: tensors to pointers. The CPU's results (native/cpu) are the reference.

#include "rkv-cuda-op.cuh"
#include "rkv-kernels.cuh"
#include "rkv-policy.h"

static rkv_op_params params_of(const ggml_tensor * node) {
    rkv_op_params par;
    memcpy(&par, node->op_params, sizeof(par));
    return par;
}

static rkv_cuda_jobs jobs_of(const ggml_tensor * jobs) {
    return { (const int32_t *) jobs->data, (int64_t) (jobs->nb[1]/sizeof(int32_t)), (int) jobs->ne[1] };
}

template <typename T>
static int64_t stride(const ggml_tensor * t, int dim) {
    return t->nb[dim]/sizeof(T);
}

static rkv_cuda_device device_of(int device) {
    const auto & info = ggml_cuda_info().devices[device];
    return { info.smpbo, turing_mma_available(info.cc) };
}

static rkv_cuda_score_args score_args(const ggml_tensor * dst) {
    const ggml_tensor * k    = dst->src[0];
    const ggml_tensor * q    = dst->src[1];
    const ggml_tensor * pos  = dst->src[3];
    const ggml_tensor * aux  = dst->src[4];
    const ggml_tensor * rope = dst->src[5];
    const ggml_tensor * v     = dst->src[7];
    const ggml_tensor * stats = dst->src[8];
    const ggml_tensor * q_pos = dst->src[9];

    rkv_cuda_score_args a = {};
    a.par       = params_of(dst);
    a.jobs      = jobs_of(dst->src[2]);
    a.n_cells   = k->ne[1];
    a.n_head_kv = a.par.n_head_kv;
    a.n_embd    = k->ne[0]/a.n_head_kv;
    a.n_group   = q->ne[0]/k->ne[0];

    a.k        = (const char *) k->data;
    a.type_k   = k->type;
    a.k_cell   = k->nb[1];
    a.k_head   = ggml_row_size(k->type, a.n_embd);
    a.k_stream = k->nb[2];
    a.q        = (const float *) q->data;
    a.q_slot   = stride<float>(q, 1);
    a.q_head   = (int64_t) a.n_group*a.n_embd;
    a.q_stream = stride<float>(q, 2);
    a.pos        = (const int32_t *) pos->data;
    a.pos_head   = stride<int32_t>(pos, 1);
    a.pos_stream = stride<int32_t>(pos, 2);
    if (aux) {
        a.aux        = (float *) aux->data;
        a.aux_cell   = stride<float>(aux, 1);
        a.aux_head   = stride<float>(aux, 2);
        a.aux_stream = stride<float>(aux, 3);
    }
    if (rope) {
        a.rope     = (const float *) rope->data;
        a.rope_row = stride<float>(rope, 1);
    }
    if (v) {
        a.v        = (const char *) v->data;
        a.type_v   = v->type;
        a.n_embd_v = v->ne[0];
        a.v_el     = v->nb[0];
        a.v_cell   = v->nb[1];
        a.v_head   = v->nb[2];
        a.v_stream = v->nb[3];
    }
    if (stats && q_pos) {
        a.stats        = (float *) stats->data;
        a.stats_head   = stride<float>(stats, 1);
        a.stats_stream = stride<float>(stats, 2);
        a.q_pos        = (const int32_t *) q_pos->data;
        a.q_pos_job    = stride<int32_t>(q_pos, 1);
    }
    a.dst      = (float *) dst->data;
    a.dst_head = stride<float>(dst, 1);
    a.dst_job  = stride<float>(dst, 2);
    return a;
}

static void score(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const rkv_cuda_score_args a = score_args(dst);
    ggml_cuda_pool_alloc<char> scratch(ctx.pool());
    const size_t n_bytes = rkv_cuda_score_scratch(a);
    if (n_bytes > 0) {
        scratch.alloc(n_bytes);
    }
    rkv_cuda_score(a, scratch.get(), device_of(ctx.device), ctx.stream());
}

static void select(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * z = dst->src[0];
    const rkv_op_params par = params_of(dst);
    rkv_cuda_select({
        (const float *) z->data, stride<float>(z, 1), stride<float>(z, 2),
        (int32_t *) dst->data, stride<int32_t>(dst, 1), stride<int32_t>(dst, 2),
        jobs_of(dst->src[1]), (int) dst->ne[1], par.window,
    }, ctx.stream());
}

static void positions(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[1];
    rkv_cuda_positions({
        (const int32_t *) src->data, stride<int32_t>(src, 1),
        (int32_t *) dst->data, stride<int32_t>(dst, 1), stride<int32_t>(dst, 2),
        jobs_of(dst->src[2]), (int) dst->ne[1],
    }, ctx.stream());
}

static void compact(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * idx = dst->src[1];
    rkv_cuda_compact({
        (char *) dst->data, (int64_t) dst->nb[1], (int64_t) dst->nb[2], (int64_t) dst->nb[3],
        (int64_t) ggml_row_size(dst->type, dst->ne[0]),
        (const int32_t *) idx->data, stride<int32_t>(idx, 1), stride<int32_t>(idx, 2),
        jobs_of(dst->src[2]), (int) dst->ne[2], (int) idx->ne[1],
    }, ggml_cuda_info().devices[ctx.device].nsm, ctx.stream());
}

void ggml_cuda_op_rkv(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (params_of(dst).sub_op) {
        case RKV_SUB_OP_POSITIONS: positions(ctx, dst); break;
        case RKV_SUB_OP_SCORE:     score    (ctx, dst); break;
        case RKV_SUB_OP_SELECT:    select   (ctx, dst); break;
        case RKV_SUB_OP_COMPACT:   compact  (ctx, dst); break;
        default: GGML_ABORT("rkv: no sub-op"); // supports_op knows no other
    }
}

static bool values_supported(const ggml_tensor * v, const rkv_op_params & par) {
    const bool adjacent = v->nb[0] == ggml_type_size(v->type);
    return rkv_cuda_type_supported(v->type) && (adjacent || !ggml_is_quantized(v->type)) && v->ne[0] % 2 == 0 &&
        v->ne[0] <= RKV_CUDA_MAX_EMBD && (par.n_hadamard_v == 0 ||
            (v->ne[0] % par.n_hadamard_v == 0 && (par.n_hadamard_v & (par.n_hadamard_v - 1)) == 0));
}

// What the kernels do not do: attention sinks, and RoPE that begins behind a head's first element (MLA).
static bool score_supported(const ggml_tensor * op, const rkv_op_params & par, rkv_cuda_device device) {
    if (!rkv_score_is_sane(op, &par) || par.policy <= RKV_POLICY_NONE || par.policy >= RKV_POLICY_COUNT || par.window < 1 ||
            (op->src[6] && rkv_asks_queries(par.policy)) || (op->src[5] && par.rope_begin > 0)) {
        return false;
    }
    const ggml_tensor * k = op->src[0];
    const int64_t n_embd = k->ne[0]/par.n_head_kv;
    return rkv_cuda_type_supported(k->type) && n_embd % 2 == 0 && n_embd <= RKV_CUDA_MAX_EMBD &&
        (par.policy != RKV_POLICY_LATEST || op->src[4]) &&
        (!rkv_needs_values(&par) || values_supported(op->src[7], par)) &&
        (!rkv_searches_copies(par.policy) || rkv_cuda_search_supported(n_embd, device));
}

bool ggml_cuda_op_rkv_supported(int device, const ggml_tensor * op) {
    const rkv_op_params par = params_of(op);
    switch (par.sub_op) {
        case RKV_SUB_OP_POSITIONS:
        case RKV_SUB_OP_SELECT:
            return true;
        case RKV_SUB_OP_COMPACT:
            return op->ne[2] % op->src[1]->ne[1] == 0;
        case RKV_SUB_OP_SCORE:
            return score_supported(op, par, device_of(device));
        default:
            return false;
    }
}
