// What the steps of the score share: the scratch memory of one launch.

#pragma once

#include "rkv-kernels.cuh"

// all of it per (job of the launch, head), n_pad cells each unless noted
struct rkv_cuda_scratch {
    half  * unit_h;  // [n_pad][d_pad] normalised keys, rounded: what the search for copies looks through
    float * unit_f;  // [n_pad][n_embd] normalised keys without their rotation (`latest` only)
    float * logits;  // [window][n_pad]
    float * mean;    // importance before pooling; lagkv: deviations of values; rpc: of all heads
    float * inv;     // 1/length of a key
    float * m;       // sum of a key's cosines; `latest`: similarity to later keys; lengths of values, deviations of keys
    float * series;  // [n_embd + n_embd/2], not per cell: the mean query ahead, and what the length of each pair counts for
    float * partial; // [n_tile][n_embd] sums of normalised keys
    unsigned long long * spared; // cosines that are not to count, fixed point: integer sums know no order
    int n_pad, n_tile, d_pad, job0;
};

#define RKV_SPARED_UNIT 4294967296.0f // 2^32

static __device__ __forceinline__ int rkv_n_cells(const int32_t * job) { return job[RKV_JOB_END] - job[RKV_JOB_BEGIN]; }

static __device__ __forceinline__ const char * rkv_key(const rkv_cuda_score_args & a, const int32_t * job, int head, int j) {
    return a.k + job[RKV_JOB_STREAM]*a.k_stream + head*a.k_head + (int64_t) (job[RKV_JOB_BEGIN] + j)*a.k_cell;
}

// the elements of the pair f that RoPE rotates
static __device__ __forceinline__ int2 rkv_pair(const rkv_op_params & par, int f) {
    return par.flags & RKV_FLAG_ROPE_NEOX ? make_int2(par.rope_begin + f, par.rope_begin + f + par.n_rot/2) :
                                            make_int2(par.rope_begin + 2*f, par.rope_begin + 2*f + 1);
}

// exact to a unit or two in the last place for x <= 0, where -use_fast_math's loses more the smaller x is (Cephes, expf)
static __device__ __forceinline__ float rkv_exp(float x) {
    if (x < -87.0f) {
        return 0.0f;
    }
    const float k = rintf(1.44269504f*x);
    const float r = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r*r, r) + 1.0f;
    return p*__int_as_float(((int) k + 127) << 23);
}

// of a block [n_warp][WARP_SIZE]; every thread gets the result. shared: [n_warp]
template <int n_warp, typename T, typename F>
static __device__ T rkv_block_reduce(T x, T * shared, F f) {
#pragma unroll
    for (int offset = WARP_SIZE/2; offset > 0; offset /= 2) {
        x = f(x, __shfl_xor_sync(0xffffffff, x, offset, WARP_SIZE));
    }
    __syncthreads(); // the last reduction has been read
    if (threadIdx.x == 0) {
        shared[threadIdx.y] = x;
    }
    __syncthreads();
    x = shared[0];
    for (int w = 1; w < n_warp; ++w) {
        x = f(x, shared[w]);
    }
    return x;
}

// as in cpu/policy-lagkv.cpp
static __device__ __forceinline__ int rkv_lag_chunk(const rkv_cuda_score_args & a, const int32_t * job) {
    return min(max((rkv_n_cells(job) - job[RKV_JOB_PIN])/4, 1), (int) a.par.chunk);
}

void rkv_cuda_search(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, rkv_cuda_device device, cudaStream_t stream);
// s.m: lengths of the values
void rkv_cuda_lengths(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream);
// dst: the values' part of `latest` is added to its keys'; s.mean is overwritten
void rkv_cuda_add_values(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream);
// s.m, s.mean: deviations of keys and of values
void rkv_cuda_lag(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream);
// dst: the whole score of triattention
void rkv_cuda_trigonometric(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream);
void rkv_cuda_later (const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream);
