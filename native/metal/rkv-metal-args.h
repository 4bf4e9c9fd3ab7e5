// What the host tells the kernels of rkv.metal. Read by the Metal compiler too: plain fields only, strides in bytes
// unless said otherwise.

#pragma once

#define RKV_METAL_SIMD    32 // lanes of a simdgroup
#define RKV_METAL_THREADS 256 // of the kernels that go over cells
#define RKV_METAL_KEYS    4  // keys that a simdgroup multiplies with a query at once
#define RKV_METAL_STEP    4  // columns that a simdgroup takes per step of the search
#define RKV_METAL_WORDS   8  // words that a thread moves between two barriers
#define RKV_METAL_MAX_SIM 4

// of the jobs tensor (enum rkv_job_field)
#define RKV_METAL_JOB_STREAM   0
#define RKV_METAL_JOB_BEGIN    1
#define RKV_METAL_JOB_OLD_END  2
#define RKV_METAL_JOB_END      3
#define RKV_METAL_JOB_KEEP     4
#define RKV_METAL_JOB_DST      5
#define RKV_METAL_JOB_SHIFT    6
#define RKV_METAL_JOB_QUERY_LO 7
#define RKV_METAL_JOB_QUERY_HI 8
#define RKV_METAL_JOB_PIN      9

// enum rkv_policy, enum rkv_op_flags, RKV_ROPE_LO
#define RKV_METAL_POLICY_RKV       1
#define RKV_METAL_POLICY_SNAPKV    2
#define RKV_METAL_POLICY_STREAMING 3
#define RKV_METAL_POLICY_LATEST    4
#define RKV_METAL_FLAG_REFERENCE   1
#define RKV_METAL_FLAG_ROPE_NEOX   2
#define RKV_METAL_ROPE_LO          256
#define RKV_METAL_LOGISTIC_SCALE   1.702f
#define RKV_METAL_LEAST_VARIANCE   1e-12f

#define RKV_METAL_TYPE_F32    0
#define RKV_METAL_TYPE_F16    1
#define RKV_METAL_TYPE_BF16   2
#define RKV_METAL_TYPE_Q8_0   3
#define RKV_METAL_TYPE_Q4_0   4
#define RKV_METAL_TYPE_Q4_1   5
#define RKV_METAL_TYPE_Q5_0   6
#define RKV_METAL_TYPE_Q5_1   7
#define RKV_METAL_TYPE_IQ4_NL 8

// Scratch of one job and head, in floats:
// logits [window][n_cells] | mean | inv | col | cos | copy (int), each [n_cells] | sum [n_embd]
#define RKV_METAL_CELL_ARRAYS 5

struct rkv_metal_score_args {
    uint64_t k_head, k_cell, k_stream;
    uint64_t q_slot, q_stream;
    uint64_t job_size;
    uint64_t pos_head, pos_stream;
    uint64_t aux_cell, aux_head, aux_stream;
    uint64_t z_head, z_job;
    uint64_t v_el, v_cell, v_head, v_stream; // v_el: between elements, 0 = a row as cached
    uint64_t slice;    // floats of scratch per job and head
    int32_t  k_type;
    int32_t  policy;
    int32_t  flags;
    int32_t  n_head_kv;
    int32_t  n_group;  // query heads per KV head
    int32_t  n_embd;   // of a head
    int32_t  n_cells;
    int32_t  window;
    int32_t  pool;
    int32_t  n_sim;
    int32_t  n_hadamard;
    int32_t  n_rot;    // 0 = no RoPE to undo
    int32_t  rope_row; // floats
    int32_t  n_row;    // rows of the cosine matrix per threadgroup, at most RKV_METAL_SIMD
    int32_t  nsg;      // simdgroups per threadgroup
    float    lambda;
    float    threshold;
    float    scale;
    float    softcap;
    float    rope_unit; // 1/mscale
    int32_t  v_type;
    int32_t  n_embd_v;
    float    value_weight;
};

struct rkv_metal_select_args {
    uint64_t z_head, z_job;
    uint64_t idx_head, idx_job;
    uint64_t job_size;
    int32_t  window;
};

// words are of 4 or 2 bytes; strides in words
struct rkv_metal_compact_args {
    uint64_t step, line, stream;
    uint64_t idx_line, idx_job; // bytes
    uint64_t job_size;
    int32_t  unit;  // words that move together
    int32_t  ratio; // lines per line of indices
};

struct rkv_metal_positions_args {
    uint64_t pos_head, pos_stream;
    uint64_t src_job;
    uint64_t job_size;
};
