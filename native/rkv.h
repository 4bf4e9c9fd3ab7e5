// rkv: a key-value cache of fixed size for llama.cpp, kept by R-KV (arXiv 2505.24133).
//
// C API beside llama.h. llama.h's own structs and functions are unchanged: a context that was created
// with a budget is an ordinary llama_context and is decoded, sampled and freed in the ordinary way.
//
// Words. budget B: cells that a sequence keeps after a compaction. buffer S: tokens admitted between two
// compactions. window: the most recent tokens, which are always kept and whose queries judge importance. recent: more
// of them that are always kept, too. pin: the first tokens of a sequence, which are never evicted. cells: what is allocated per sequence and
// layer, B + max(S, n_batch_seq). n_ctx: the logical limit on positions; it does not size the cache.

#pragma once

#include "llama.h"
#include "rkv-policy.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bumped whenever a struct or a function below changes; rkv_version() returns the library's.
#define RKV_VERSION 5

// All counts are in cells (= tokens).
struct rkv_params {
    int32_t  policy;      // enum rkv_policy
    uint32_t budget;      // B, per layer; ignored where layer_budgets is set
    uint32_t buffer;      // S
    uint32_t window;      // alpha, 1..64
    uint32_t pin;         // 0..budget - window - 1
    uint32_t pool;        // width of the max-pool over importance: odd, 1 = none
    float    lambda;      // 0..1
    float    threshold;   // T: cosine above which two keys count as copies, -1..1
    uint32_t n_sim;       // `latest`: how many of the highest similarities are averaged, 1..4; 0 = the policy's own, 2
    float    memory;      // 0..1: importance is max(memory * what was stored with the cell, new); gkv, and rkv, snapkv, latest.
                          // 0 = none; negative = the policy's own, 0.8 for gkv and none for the others
    uint32_t chunk;       // chunkkv: adjacent cells that are kept or dropped together; lagkv: cells of a chunk. 0 = the policy's
                          // own, 10 and 128
    uint32_t recent;      // the most recent tokens that are always kept, window among them; of a layer's budget at most half,
                          // but at least the window. 0 = the policy's own, 96 for latest and the window for the others
    uint32_t growth;      // rpc: of the tokens of each buffer one in `growth` is kept, until the budget is reached; 1 = all
    float    value_share; // value-aware: the share of the cells that are kept for the length of their values, 0..1
    float    value_weight; // latest: of how far a value is from the mean value, beside the score of its key; 0 = none, negative =
                          // the policy's own, 0.5
    uint32_t seed;        // value-aware: of its samples
    bool     shared_heads; // one set of cells for all layers and heads, by the mean of their normalised scores; to compare with
    bool     reference;   // `rkv`: a key without a copy zeroes column 0, as the authors' code does
    uint32_t n_batch_seq; // most tokens of one sequence in one llama_decode (or `buffer`, if that is more);
                          // 0 = the context's n_batch

    const uint32_t * layer_budgets; // one budget per model layer, or NULL: uniform
    uint32_t       n_layer_budgets;
};

// latest, 1024 + 256 cells, window 8, pin 4, pool 7, lambda 0.1, threshold 0.5; n_sim, memory, chunk, recent and value_weight the
// policy's own, growth 4, value_share 0.1, seed 0. The papers' other values are up to the caller: buffer 128, gkv lambda 0.5 and
// pool 1, rpc window 32 and the prompt pinned, chunkkv pool 1.
LLAMA_API struct rkv_params rkv_default_params(void);

LLAMA_API int32_t      rkv_version   (void);
LLAMA_API const char * rkv_build_info(void); // "llama-cpp-python <version>, llama.cpp <commit>"
LLAMA_API const char * rkv_policy_name(int32_t policy); // NULL if there is none

// What went wrong in the last rkv_* call on this thread (or in llama_decode on a context with a budget);
// one line, "" if nothing did.
LLAMA_API const char * rkv_last_error(void);

// true if the parameters are consistent in themselves; false sets rkv_last_error().
LLAMA_API bool rkv_params_check(const struct rkv_params * params);

// llama_init_from_model with a budget. NULL on failure, with rkv_last_error() set: parameters out of range, or
// a model whose cache cannot be compacted. The context must have one stream per sequence (kv_unified false, or
// n_seq_max 1).
LLAMA_API struct llama_context * rkv_init_from_model(
        struct llama_model * model, struct llama_context_params cparams, const struct rkv_params * params);

// The same in two steps, for callers that cannot replace the call: the next llama_init_from_model on this thread
// gets the budget. rkv_end_init() returns false, with rkv_last_error() set, if that call failed or never came.
LLAMA_API void rkv_begin_init(const struct rkv_params * params); // copies *params
LLAMA_API bool rkv_end_init  (void);

struct rkv_stats {
    bool     active;           // false: the context has no budget, and all below is 0 but cells and bytes
    uint32_t cells;            // allocated per sequence in the widest layer
    uint64_t bytes;            // allocated for K, V, query rings, positions and stored scores, all sequences; and what the
                               // memory has beside them: caches of sliding windows, recurrent states
    uint64_t bytes_kv;         // of these K and V that the budget governs
    uint64_t compactions;      // one per sequence and pass
    uint64_t t_compaction_us;  // time spent in them
    uint64_t tokens_evicted;   // tokens dropped, averaged over layers and heads, rounded down
};

LLAMA_API struct rkv_stats rkv_get_stats(const struct llama_context * ctx);

// What a context takes in one type of buffer, in bytes. Also of a context whose model was loaded with no_alloc: then it
// is what would be allocated, and no weight is read.
struct rkv_memory {
    char     device[64]; // ggml's name: "CPU", "CUDA0"
    char     buffer[64]; // "CPU", "CPU_REPACK", "CUDA0", "CUDA_Host"
    bool     host;       // in main memory
    uint64_t weights;
    uint64_t cache;      // K, V and all that a budget adds to them; recurrent states
    uint64_t compute;    // decode graphs, logits, the CPU's work buffer
    uint64_t pass;       // a compaction's graph and its kernels' temporary memory
};

// One entry per type of buffer; returns their number, or -1 on an error. dst may be NULL. Between two decodes only.
LLAMA_API int32_t rkv_get_memory(struct llama_context * ctx, struct rkv_memory * dst, size_t n_max);

// Cells in use by a sequence in the widest layer, -1 on a bad sequence.
LLAMA_API int32_t rkv_seq_used(const struct llama_context * ctx, llama_seq_id seq_id);

// Tokens that a sequence takes before its next compaction, 0 if the next token brings one; -1 on a bad sequence. What a
// batch adds beyond them is there before the compaction judges: speculative drafts should end with them.
LLAMA_API int32_t rkv_seq_room(const struct llama_context * ctx, llama_seq_id seq_id);

// Compact a sequence now, whatever its fill. false if there is nothing to evict or on an error (rkv_last_error()).
LLAMA_API bool rkv_seq_compact(struct llama_context * ctx, llama_seq_id seq_id);

// The first n tokens of a sequence are never evicted, from now on and until it is cleared: then params.pin is. At most
// what the narrowest layer's budget leaves beside its most recent tokens and one cell. false, with rkv_last_error(), on a bad argument,
// or where the sequence was compacted and n is more than was pinned.
LLAMA_API bool rkv_seq_pin(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n);

// Policy given: what each of the first n cells of a layer and head is worth to the sequence's next compaction. Cells without
// a score count as more than all others, the most recent first; heads without any keep the most recent.
LLAMA_API bool rkv_seq_set_scores(struct llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head,
        const float * z, size_t n);

// What a layer and KV head holds, in cell order, which is chronological. Each returns the number of cells n, or -1
// on a bad argument; with a NULL destination nothing is written. n_max: room in the destination, in cells.
LLAMA_API int32_t rkv_get_positions(struct llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head,
        int32_t * dst, size_t n_max);                       // [n] true token positions
LLAMA_API int32_t rkv_get_keys     (struct llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head,
        float * dst, size_t n_max);                         // [n, n_embd_head_k] as cached (after RoPE), dequantised
LLAMA_API int32_t rkv_get_keys_unrotated(struct llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head,
        float * dst, size_t n_max);                         // [n, n_embd_head_k] with RoPE (and Hadamard) undone
LLAMA_API int32_t rkv_get_values   (struct llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head,
        float * dst, size_t n_max);                         // [n, n_embd_head_v]
LLAMA_API int32_t rkv_get_scores   (struct llama_context * ctx, llama_seq_id seq_id, int32_t layer, int32_t head,
        int32_t slot, float * dst, size_t n_max);           // [n] stored float `slot` (0..4) of each cell
// The observation window's queries, oldest first: [n, n_head, n_embd_head_k], as dotted with the cached keys; n_head as in
// rkv_layer.
LLAMA_API int32_t rkv_get_queries  (struct llama_context * ctx, llama_seq_id seq_id, int32_t layer,
        float * dst, size_t n_max);
LLAMA_API float   rkv_get_attn_scale(const struct llama_context * ctx, int32_t layer); // 0 on a bad layer

struct rkv_layer {
    int32_t n_head;        // query heads that read these cells; of n_readers layers, KV head by KV head
    int32_t n_readers;     // layers that read them: 1, or more where layers share a cache
    int32_t n_head_kv;
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_rot;         // rotated elements of a key, 0 = no RoPE
    int32_t rope_begin;    // the first of them
    uint32_t budget;
    float   scale, softcap;
    bool    has_sinks;     // attention sinks take part in the importance
    bool    v_in_k;        // MLA: V is the first elements of K
    bool    unrotatable;   // RoPE can be undone (rkv_get_keys_unrotated, policies latest and triattention)
};
// false: a layer without cells under the budget (recurrent, windowed, or reading another layer's), or a bad index
LLAMA_API bool rkv_get_layer(const struct llama_context * ctx, int32_t layer, struct rkv_layer * dst);

// The selection by itself, on the CPU reference kernels, for one layer and one sequence: which rows are kept.
struct rkv_select_args {
    struct rkv_params params;    // all but buffer, n_batch_seq, layer_budgets, growth and shared_heads
    int32_t  layer;              // value-aware: which layer's samples
    int32_t  n, n_head_kv, n_head, n_embd_head; // cells, heads, row length
    int32_t  n_old;              // cells [0, n_old) went through a compaction before
    int32_t  n_threads;
    int32_t  type_k;             // enum ggml_type that the keys are stored as
    float    scale, softcap;     // attention scale; softcap 0 = none
    const float   * k;           // [n, n_head_kv, n_embd_head]
    const float   * q;           // [window, n_head, n_embd_head]
    const int32_t * pos;         // [n, n_head_kv] true positions (latest, value-aware, triattention)
    const float   * v;           // [n, n_head_kv, n_embd_head_v] (value-aware, lagkv, latest), else NULL. latest does without
                                 // them where value_weight is 0 or negative
    int32_t  n_embd_head_v, type_v;
    float         * aux;         // [n_aux, n, n_head_kv] stored floats, read and updated; may be NULL: then none is old. n_aux:
                                 // latest n_sim, where 0 is 2; h2o, gkv, given 1; one more for latest, rkv and snapkv with a memory
    float         * stats;       // triattention: [n_head, n_embd_head + n_embd_head/2 + 1], read and updated; may be NULL. The
                                 // window's queries belong to its cells' positions in head 0
    // RoPE of the keys; rope_n_rot 0 = none
    int32_t  rope_n_rot, rope_neox, rope_n_ctx_orig;
    float    rope_freq_base, rope_freq_scale, rope_ext_factor, rope_attn_factor, rope_beta_fast, rope_beta_slow;
    const float * rope_freq_factors; // [n_rot/2] or NULL
};
// idx: [n_head_kv, min(budget, n)] kept rows, ascending. score: [n_head_kv, n] or NULL. 0 on success, -1 on an error.
LLAMA_API int32_t rkv_select(const struct rkv_select_args * args, int32_t * idx, float * score);

// RoPE undone with the scorer's own tables, in place: k [n, n_head_kv, n_embd_head]. Uses args' n, pos and rope_*.
LLAMA_API int32_t rkv_unrotate(const struct rkv_select_args * args, float * k);

#ifdef __cplusplus
}
#endif
