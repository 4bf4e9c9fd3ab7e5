// What the steps of the score share: the scratch memory of one launch.

#pragma once

#include "rkv-kernels.cuh"

// all of it per (job of the launch, head), n_pad cells each unless noted
struct rkv_cuda_scratch {
    half  * unit_h;  // [n_pad][d_pad] normalised keys, rounded: what the search for copies looks through
    float * unit_f;  // [n_pad][n_embd] normalised keys without their rotation (`latest` only)
    float * logits;  // [window][n_pad]
    float * mean;    // importance before pooling
    float * inv;     // 1/length of a key
    float * m;       // sum of a key's cosines; `latest`: similarity to later keys
    float * partial; // [n_tile][n_embd] sums of normalised keys
    unsigned long long * spared; // cosines that are not to count, fixed point: integer sums know no order
    int n_pad, n_tile, d_pad, job0;
};

#define RKV_SPARED_UNIT 4294967296.0f // 2^32

static __device__ __forceinline__ int rkv_n_cells(const int32_t * job) { return job[RKV_JOB_END] - job[RKV_JOB_BEGIN]; }

static __device__ __forceinline__ const char * rkv_key(const rkv_cuda_score_args & a, const int32_t * job, int head, int j) {
    return a.k + job[RKV_JOB_STREAM]*a.k_stream + head*a.k_head + (int64_t) (job[RKV_JOB_BEGIN] + j)*a.k_cell;
}

void rkv_cuda_search(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, rkv_cuda_device device, cudaStream_t stream);
void rkv_cuda_later (const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream);
