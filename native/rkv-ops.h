// GGML_OP_RKV: the steps of a compaction as nodes of a ggml graph. One op with a sub-op in its parameters, so that
// a backend needs a single entry in its dispatch.
//
// A *job* is one sequence (stream) to be compacted; every node handles all jobs of a pass for one layer.
// Rows are physical rows of the layer's cache, cells in chronological order.

#pragma once

#include "ggml.h"
#include "rkv-policy.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RKV_MAX_WINDOW 64
#define RKV_MAX_AUX    4

enum rkv_sub_op {
    RKV_SUB_OP_POSITIONS = 0, // true positions of the cells that were added since the last compaction
    RKV_SUB_OP_SCORE     = 1, // Z of each cell
    RKV_SUB_OP_SELECT    = 2, // rows to keep, ascending
    RKV_SUB_OP_COMPACT   = 3, // gather them, in place
};

// one column of the jobs tensor, I32 [RKV_JOB_N, n_jobs]
enum rkv_job_field {
    RKV_JOB_STREAM,
    RKV_JOB_BEGIN,    // cells [begin, end) are used
    RKV_JOB_OLD_END,  // cells [begin, old_end) were kept by an earlier compaction
    RKV_JOB_END,
    RKV_JOB_KEEP,     // cells to keep
    RKV_JOB_DST,      // first row that they move to
    RKV_JOB_SHIFT,    // row + shift = index into the positions input
    RKV_JOB_QUERY_LO, // which slots of the query ring belong to the window, a bit each
    RKV_JOB_QUERY_HI,
    RKV_JOB_N,
};

enum rkv_op_flags {
    RKV_FLAG_REFERENCE = 1, // see rkv_params.reference
    RKV_FLAG_ROPE_NEOX = 2, // rotated pairs are (i, i + n_rot/2) instead of (2i, 2i + 1)
};

// op_params of every RKV node
struct rkv_op_params {
    int32_t sub_op;
    int32_t policy;      // enum rkv_policy
    int32_t n_head_kv;
    int32_t window;
    int32_t pool;
    int32_t pin;
    int32_t n_sim;
    int32_t flags;
    int32_t n_hadamard;  // size of the Hadamard blocks that the cached keys are rotated with, 0 = none
    int32_t n_rot;       // rotated share of a head, 0 = no RoPE
    float   lambda;
    float   threshold;
    float   scale;       // attention scale
    float   softcap;     // 0 = none
    float   rope_mscale; // what RoPE multiplies the rotated share by
    int32_t rope_begin;  // first rotated element of a head (behind the latent part of an MLA key)
};

// The RoPE table is F32 [n_rot, RKV_ROPE_LO + n_hi]: cos then sin of pos*freq for pos 0..LO-1, then for LO*0, LO*1, ..
#define RKV_ROPE_LO 256

// pos [n_cells, n_head_kv, n_stream] I32, new_pos [n, n_jobs] I32; in place
struct ggml_tensor * ggml_rkv_positions(struct ggml_context * ctx, struct ggml_tensor * pos,
        struct ggml_tensor * new_pos, struct ggml_tensor * jobs, const struct rkv_op_params * par);

// k [n_embd_k_gqa, n_cells, n_stream] any type; q [n_embd_head_k*n_head, window + 1, n_stream] F32;
// aux [n_aux, n_cells, n_head_kv, n_stream] F32, updated in place, or NULL; rope: the table, or NULL
// -> F32 [n_cells, n_head_kv, n_jobs]; entry j belongs to row begin + j
struct ggml_tensor * ggml_rkv_score(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * q,
        struct ggml_tensor * jobs, struct ggml_tensor * pos, struct ggml_tensor * aux, struct ggml_tensor * rope,
        const struct rkv_op_params * par);

// attention sinks, F32 [n_head]: a key of every query's softmax that is no cell (NULL: none)
void ggml_rkv_score_add_sinks(struct ggml_tensor * score, struct ggml_tensor * sinks);

// -> I32 [n_keep_max, n_head_kv, n_jobs]
struct ggml_tensor * ggml_rkv_select(struct ggml_context * ctx, struct ggml_tensor * score, struct ggml_tensor * jobs,
        int64_t n_keep_max, const struct rkv_op_params * par);

// data: a view [unit, n_cells, n_head_kv * m, n_stream] of the tensor to gather in, where the unit is what moves;
// idx [n_keep_max, n_head_kv or 1, n_jobs]
struct ggml_tensor * ggml_rkv_compact(struct ggml_context * ctx, struct ggml_tensor * data, struct ggml_tensor * idx,
        struct ggml_tensor * jobs, const struct rkv_op_params * par);

// What any kernel may take for granted about a SCORE node; a backend adds its own limits (types, head sizes).
static inline bool rkv_score_is_sane(const struct ggml_tensor * op, const struct rkv_op_params * par) {
    const struct ggml_tensor * k = op->src[0];
    const struct ggml_tensor * q = op->src[1];
    if (par->n_head_kv < 1 || k->ne[0] % par->n_head_kv != 0) {
        return false;
    }
    const int64_t n_embd = k->ne[0]/par->n_head_kv;
    return n_embd % ggml_blck_size(k->type) == 0 && k->nb[0] == ggml_type_size(k->type) &&
        q->nb[0] == sizeof(float) && q->ne[0] % k->ne[0] == 0 &&
        par->window >= 0 && par->window <= RKV_MAX_WINDOW && q->ne[1] >= par->window &&
        (par->n_hadamard == 0 || (n_embd % par->n_hadamard == 0 && (par->n_hadamard & (par->n_hadamard - 1)) == 0)) &&
        par->n_rot >= 0 && par->n_rot % 2 == 0 && par->rope_begin >= 0 && par->rope_begin + par->n_rot <= n_embd &&
        (!op->src[6] || (op->src[6]->type == GGML_TYPE_F32 && op->src[6]->ne[0]*n_embd == q->ne[0])) &&
        (!op->src[4] || (par->n_sim >= 1 && par->n_sim <= RKV_MAX_AUX && op->src[4]->ne[0] >= par->n_sim));
}

// Temporary memory, in bytes, that a device's kernels may take at once; a single head of one sequence may need more.
#define RKV_SCRATCH_MAX ((size_t) 64 << 20)

// At most this much for a head of one job (CUDA): rounded or unrotated keys, logits, and a few floats per cell.
static inline size_t rkv_score_scratch(const struct rkv_op_params * par, int64_t n_cells, int64_t n_embd) {
    if (par->policy == RKV_POLICY_STREAMING) {
        return 0;
    }
    const int64_t n_pad = (n_cells + 63)/64*64;
    size_t cell = (par->window + 1)*sizeof(float);
    if (par->policy == RKV_POLICY_RKV) {
        cell += (n_embd + 15)/16*16*2 + 2*sizeof(float) + sizeof(int64_t) + (n_embd + 15)/16;
    }
    if (par->policy == RKV_POLICY_LATEST) {
        cell += (n_embd + 1)*sizeof(float);
    }
    return n_pad*cell + 8*256; // each of up to eight arrays is aligned
}

#ifdef __cplusplus
}
#endif
