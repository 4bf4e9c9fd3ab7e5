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
#define RKV_MAX_AUX    4 // similarities
#define RKV_MAX_CHUNK  4096
#define RKV_MAX_RECENT 4096

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
    RKV_JOB_PIN,      // the first cells, always kept
    RKV_JOB_N,
};

enum rkv_op_flags {
    RKV_FLAG_REFERENCE = 1, // see rkv_params.reference
    RKV_FLAG_ROPE_NEOX = 2, // rotated pairs are (i, i + n_rot/2) instead of (2i, 2i + 1)
};

// op_params of every RKV node: 64 bytes at most
struct rkv_op_params {
    int32_t sub_op       : 8;
    int32_t policy       : 8;  // enum rkv_policy
    int32_t layer        : 16; // of the model
    int32_t window       : 16;
    int32_t pool         : 16;
    int32_t n_sim        : 8;
    int32_t flags        : 8;
    int32_t chunk        : 16; // adjacent cells that are judged together (chunkkv, lagkv)
    int32_t n_hadamard   : 16; // size of the Hadamard blocks that the cached keys are rotated with, 0 = none
    int32_t n_hadamard_v : 16; // of the values
    int32_t n_rot        : 16; // rotated share of a head, 0 = no RoPE
    int32_t rope_begin   : 16; // first rotated element of a head (behind the latent part of an MLA key)
    int32_t n_head_kv;
    float   lambda;
    float   threshold;
    float   scale;       // attention scale
    float   softcap;     // 0 = none
    float   rope_mscale; // what RoPE multiplies the rotated share by
    float   memory;      // what is left of a stored importance after a pass, 0 = none is stored
    float   value_share; // value-aware: of the cells to choose, those kept for their values
    uint32_t seed;       // value-aware
    float   value_weight; // latest, 0 = values do not count
};

// Floats that a policy stores with each cell. latest: [0, n_sim) similarities, then the importance where it has a memory;
// rkv, snapkv: the importance where they have a memory; gkv: F; h2o: the attention so far; given: z.
static inline int rkv_n_aux(const struct rkv_op_params * par) {
    const int memory = par->memory > 0.0f ? 1 : 0;
    switch (par->policy) {
        case RKV_POLICY_LATEST: return par->n_sim + memory;
        case RKV_POLICY_RKV:
        case RKV_POLICY_SNAPKV: return memory;
        case RKV_POLICY_H2O:
        case RKV_POLICY_GKV:
        case RKV_POLICY_GIVEN:  return 1;
        default:                return 0;
    }
}

// triattention: floats that are stored with a query head, of its queries without their rotation: the mean, [n_embd]; the
// mean length of each rotated pair, [n_rot/2]; and, as the last, how many queries these are of.
static inline int64_t rkv_n_stats(const struct rkv_op_params * par, int64_t n_embd) {
    return par->policy == RKV_POLICY_TRIATTENTION ? n_embd + n_embd/2 + 1 : 0;
}

// policies that cannot do without values, and whether a pass looks at them
static inline bool rkv_is_of_values(int32_t policy) { return policy == RKV_POLICY_VALUE_AWARE || policy == RKV_POLICY_LAGKV; }
static inline bool rkv_needs_values(const struct rkv_op_params * par) {
    return rkv_is_of_values(par->policy) || (par->policy == RKV_POLICY_LATEST && par->value_weight > 0.0f);
}
static inline bool rkv_needs_rope  (int32_t policy) { return policy == RKV_POLICY_LATEST || policy == RKV_POLICY_TRIATTENTION; }

// whose attention counts: the window's queries are multiplied with all keys
static inline bool rkv_asks_queries(int32_t policy) {
    return policy != RKV_POLICY_STREAMING && policy != RKV_POLICY_KEYDIFF && policy != RKV_POLICY_LAGKV &&
        policy != RKV_POLICY_TRIATTENTION && policy != RKV_POLICY_GIVEN;
}
static inline bool rkv_searches_copies(int32_t policy) { return policy == RKV_POLICY_RKV || policy == RKV_POLICY_GKV; }

// triattention: the powers of two that the distances to future queries go up to
#define RKV_TRI_OFFSETS 17

// latest: the logistic function of this many deviations is close to the normal distribution's; variances are at least that much
#define RKV_LOGISTIC_SCALE 1.702f
#define RKV_LEAST_VARIANCE 1e-12f

// value-aware: the score of a cell that is kept for its values, above what any sampled one can reach
#define RKV_KEPT_SCORE 64.0f

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

// attention sinks, F32 [n_head]: a key of every query's softmax that is no cell (NULL: none); src[6]
void ggml_rkv_score_add_sinks(struct ggml_tensor * score, struct ggml_tensor * sinks);

// values, for a policy that looks at them: a view [n_embd_head_v, n_cells, n_head_kv, n_stream], whose elements are not
// adjacent where V is transposed; src[7]
void ggml_rkv_score_add_values(struct ggml_tensor * score, struct ggml_tensor * v);

// triattention: stats F32 [rkv_n_stats, n_head, n_stream], updated in place, begun anew where a sequence has no old cells;
// q_pos I32 [window, n_jobs], the position of the query that each slot of the ring holds, -1 = none; src[8], src[9]
void ggml_rkv_score_add_stats(struct ggml_tensor * score, struct ggml_tensor * stats, struct ggml_tensor * q_pos);

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
        par->n_sim >= 0 && par->n_sim <= RKV_MAX_AUX &&
        ((par->policy != RKV_POLICY_CHUNKKV && par->policy != RKV_POLICY_LAGKV) || par->chunk >= 1) &&
        (rkv_n_aux(par) == 0 || (op->src[4] && op->src[4]->ne[0] >= rkv_n_aux(par))) &&
        (!rkv_needs_values(par) || (op->src[7] && op->src[7]->ne[2] == par->n_head_kv)) &&
        (par->policy != RKV_POLICY_TRIATTENTION || (op->src[8] && op->src[9] && op->src[8]->ne[0] == rkv_n_stats(par, n_embd)));
}

// Temporary memory, in bytes, that a device's kernels may take at once; a single head of one sequence may need more.
#define RKV_SCRATCH_MAX ((size_t) 64 << 20)

// At most this much for a head of one job (CUDA): rounded or unrotated keys, logits, and a few floats per cell. The parts of
// a policy are rkv-score.cu's layout().
static inline size_t rkv_score_scratch(const struct rkv_op_params * par, int64_t n_cells, int64_t n_embd) {
    if (par->policy == RKV_POLICY_STREAMING || par->policy == RKV_POLICY_GIVEN) {
        return 0;
    }
    const int64_t n_pad = (n_cells + 63)/64*64;
    size_t cell = rkv_asks_queries(par->policy) ? (par->window + 1)*sizeof(float) : 0, head = 0;
    switch (par->policy) {
        case RKV_POLICY_RKV:
        case RKV_POLICY_GKV:
            cell += (n_embd + 15)/16*16*2 + 2*sizeof(float) + sizeof(int64_t) + (n_embd + 15)/16;
            break;
        case RKV_POLICY_LATEST:
            cell += (n_embd + 1)*sizeof(float);
            break;
        case RKV_POLICY_VALUE_AWARE:
            cell += sizeof(float);
            break;
        case RKV_POLICY_KEYDIFF:
            cell += 2*sizeof(float) + (n_embd + 15)/16;
            break;
        case RKV_POLICY_LAGKV:
            cell += 2*sizeof(float);
            break;
        case RKV_POLICY_TRIATTENTION:
            cell += sizeof(float);
            head += (n_embd + n_embd/2)*sizeof(float);
            break;
        default:
            break;
    }
    return n_pad*cell + head + 8*256; // each of up to eight arrays is aligned
}

#ifdef __cplusplus
}
#endif
