// The kernels of a compaction over raw pointers; rkv-cuda-op.cu binds them to GGML_OP_RKV. One launch handles all heads
// of all jobs. Nothing here waits for the device, and no result depends on the order in which blocks run.

#pragma once

#include "common.cuh"
#include "rkv-ops.h"

#define RKV_CUDA_MAX_EMBD 576 // of a head: MLA's latent K
#define RKV_CUDA_TILE     64  // cells

// one column of the jobs tensor, as the kernels see it
struct rkv_cuda_jobs {
    const int32_t * data;
    int64_t stride; // in elements
    int     n;

    __device__ const int32_t * operator[](int i) const { return data + i*stride; }
};

struct rkv_cuda_device {
    size_t smpbo; // shared memory per block that it allows
    bool   mma;   // has the matrix instructions of ggml_cuda_mma
};

//
// score
//

// strides of typed pointers in elements, of k in bytes
struct rkv_cuda_score_args {
    const char    * k;    int64_t k_cell, k_head, k_stream; int type_k;
    const float   * q;    int64_t q_slot, q_head, q_stream; // q_head: from one KV head's queries to the next one's
    const int32_t * pos;  int64_t pos_head, pos_stream;
    float         * aux;  int64_t aux_cell, aux_head, aux_stream;
    const float   * rope; int64_t rope_row;
    const char    * v;    int64_t v_el, v_cell, v_head, v_stream; int type_v, n_embd_v; // bytes
    float         * stats; int64_t stats_head, stats_stream; // of a query head
    const int32_t * q_pos; int64_t q_pos_job;
    float         * dst;  int64_t dst_head, dst_job;
    rkv_cuda_jobs   jobs;
    rkv_op_params   par;
    int n_cells, n_head_kv, n_group, n_embd;
    int head0; // of the layer's heads the first that is worked on
};

// bytes that rkv_cuda_score needs; jobs beyond a fixed bound are worked on in turns over the same memory
size_t rkv_cuda_score_scratch(const rkv_cuda_score_args & a);
void   rkv_cuda_score(const rkv_cuda_score_args & a, char * scratch, rkv_cuda_device device, cudaStream_t stream);

bool rkv_cuda_type_supported(int type);
bool rkv_cuda_search_supported(int n_embd, rkv_cuda_device device);

//
// select, positions, compact
//

struct rkv_cuda_select_args {
    const float * score; int64_t score_head, score_job;
    int32_t     * dst;   int64_t dst_head, dst_job;
    rkv_cuda_jobs jobs;
    int n_head, window;
};
void rkv_cuda_select(const rkv_cuda_select_args & a, cudaStream_t stream);

struct rkv_cuda_positions_args {
    const int32_t * src; int64_t src_job;
    int32_t       * dst; int64_t dst_head, dst_stream;
    rkv_cuda_jobs jobs;
    int n_head;
};
void rkv_cuda_positions(const rkv_cuda_positions_args & a, cudaStream_t stream);

struct rkv_cuda_compact_args {
    char          * data; int64_t cell, line, stream, unit; // bytes
    const int32_t * idx;  int64_t idx_head, idx_job;
    rkv_cuda_jobs jobs;
    int n_line, n_head; // n_line is a multiple of n_head
};
void rkv_cuda_compact(const rkv_cuda_compact_args & a, int n_sm, cudaStream_t stream); // n_sm: multiprocessors
