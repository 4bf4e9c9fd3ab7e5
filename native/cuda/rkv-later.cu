// `latest`: a key's similarity to later keys. Similarities never change, so the highest are stored with the cell and only
// keys that are new since the last pass are compared, in float32: what is stored has to be the same for good.

#include "rkv-score.cuh"

static constexpr int LATER_K = 32, LATER_THREADS = 256;

static __device__ __forceinline__ void keep_highest(float (&best)[RKV_MAX_AUX], int count, float x) {
#pragma unroll
    for (int i = 0; i < RKV_MAX_AUX; ++i) {
        if (i < count && x > best[i]) {
            const float lower = best[i];
            best[i] = x;
            x = lower;
        }
    }
}

static __global__ void __launch_bounds__(LATER_THREADS) rkv_later(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int tile = blockIdx.x, head = blockIdx.y, tid = threadIdx.x;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int n     = rkv_n_cells(job);
    const int n_old = job[RKV_JOB_OLD_END] - job[RKV_JOB_BEGIN];
    if (tile*RKV_CUDA_TILE >= n || n <= a.par.window) {
        return;
    }
    constexpr int n_lane = 16; // threads per row
    constexpr int stride = RKV_CUDA_TILE + 1;
    __shared__ float shared[2*LATER_K*stride > RKV_CUDA_TILE*n_lane*RKV_MAX_AUX ? 2*LATER_K*stride : RKV_CUDA_TILE*n_lane*RKV_MAX_AUX];
    float * rows = shared;                  // [LATER_K][stride]
    float * cols = shared + LATER_K*stride; // [LATER_K][stride]

    const int64_t at   = (int64_t) (blockIdx.z*a.n_head_kv + head)*s.n_pad;
    const float * unit = s.unit_f + at*a.n_embd;
    const int n_sim = a.par.n_sim;
    const int tx = tid%n_lane, ty = tid/n_lane; // rows from 4*ty, columns tx, tx + 16, ..

    float best[4][RKV_MAX_AUX];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < RKV_MAX_AUX; ++i) {
            best[r][i] = -1.0f;
        }
    }
    const int n_tile = (n + RKV_CUDA_TILE - 1)/RKV_CUDA_TILE;
    for (int other = max(tile, n_old/RKV_CUDA_TILE); other < n_tile; ++other) {
        float acc[4][4] = {};
        for (int k0 = 0; k0 < a.n_embd; k0 += LATER_K) {
            __syncthreads();
            for (int it = tid; it < RKV_CUDA_TILE*LATER_K/2; it += LATER_THREADS) {
                const int c = it/(LATER_K/2), e = 2*(it%(LATER_K/2));
                const bool in = k0 + e < a.n_embd;
                const float2 zero = make_float2(0.0f, 0.0f);
                const float2 x = in ? *(const float2 *) (unit + (int64_t) (tile *RKV_CUDA_TILE + c)*a.n_embd + k0 + e) : zero;
                const float2 y = in ? *(const float2 *) (unit + (int64_t) (other*RKV_CUDA_TILE + c)*a.n_embd + k0 + e) : zero;
                rows[e*stride + c]       = x.x;
                rows[(e + 1)*stride + c] = x.y;
                cols[e*stride + c]       = y.x;
                cols[(e + 1)*stride + c] = y.y;
            }
            __syncthreads();
#pragma unroll 8
            for (int e = 0; e < LATER_K; ++e) {
                float x[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    x[r] = rows[e*stride + 4*ty + r];
                }
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float y = cols[e*stride + tx + 16*c];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        acc[r][c] += x[r]*y;
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int i = tile*RKV_CUDA_TILE + 4*ty + r, j = other*RKV_CUDA_TILE + tx + 16*c;
                if (j > i && j >= n_old && j < n) {
                    keep_highest(best[r], n_sim, acc[r][c]);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < RKV_MAX_AUX; ++i) {
            shared[((4*ty + r)*n_lane + tx)*RKV_MAX_AUX + i] = best[r][i];
        }
    }
    __syncthreads();
    const int i = tile*RKV_CUDA_TILE + tid;
    if (tid < RKV_CUDA_TILE && i < n) {
        float * stored = a.aux + job[RKV_JOB_STREAM]*a.aux_stream + head*a.aux_head + (job[RKV_JOB_BEGIN] + i)*a.aux_cell;
        float top[RKV_MAX_AUX];
#pragma unroll
        for (int t = 0; t < RKV_MAX_AUX; ++t) {
            top[t] = t < n_sim && i < n_old ? stored[t] : -1.0f;
        }
        for (int l = 0; l < n_lane; ++l) {
            for (int t = 0; t < n_sim; ++t) {
                keep_highest(top, n_sim, shared[(tid*n_lane + l)*RKV_MAX_AUX + t]);
            }
        }
        float total = 0.0f;
#pragma unroll
        for (int t = 0; t < RKV_MAX_AUX; ++t) {
            if (t < n_sim) {
                stored[t] = top[t];
                total += top[t];
            }
        }
        s.m[at + i] = total/n_sim;
    }
}

void rkv_cuda_later(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    rkv_later<<<dim3(s.n_tile, a.n_head_kv, n_jobs), LATER_THREADS, 0, stream>>>(a, s);
}
