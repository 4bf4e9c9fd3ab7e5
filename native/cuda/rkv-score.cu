// Z of each cell: lengths and sums of keys, importance, and the formula of each policy at the end. The search for copies
// and the similarity to later keys have files of their own.

#include "rkv-score.cuh"
#include "rkv-dequant.cuh"
#include "rkv-rotate.cuh"
#include "rkv-policy.h"

#include <cstdlib>

//
// keys: their lengths; normalised, rounded, and summed up by tile (`latest`: without their rotation, unrounded)
//

static constexpr int KEY_WARPS = 8;

template <int type, int NP, bool unrotated>
static __global__ void __launch_bounds__(KEY_WARPS*WARP_SIZE) rkv_keys(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int jh = blockIdx.z*a.n_head_kv + head;
    const int n  = rkv_n_cells(job);
    if (tile*RKV_CUDA_TILE >= n) {
        return;
    }
    extern __shared__ float shared[]; // [KEY_WARPS][n_embd]

    float2 sum[NP];
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        sum[p] = make_float2(0.0f, 0.0f);
    }
    const char * keys = rkv_key(a, job, head, 0);
#pragma unroll unrotated || NP > 2 ? 1 : 4
    for (int c = warp; c < RKV_CUDA_TILE; c += KEY_WARPS) {
        const int j = tile*RKV_CUDA_TILE + c;
        const char * key = keys + min(j, n - 1)*a.k_cell;
        float2 x[NP];
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            x[p] = j < n && e < a.n_embd ? rkv_load2<type>(a.type_k, key, e) : make_float2(0.0f, 0.0f);
        }
        if (j < n) {
            if (unrotated) {
                if (a.par.n_hadamard > 0) {
                    rkv_undo_hadamard(x, a.par.n_hadamard);
                }
                if (a.par.n_rot > 0 && a.rope) {
                    const int32_t pos = a.pos[job[RKV_JOB_STREAM]*a.pos_stream + head*a.pos_head + job[RKV_JOB_BEGIN] + j];
                    rkv_undo_rope(a.par, x, a.n_embd, pos, a.rope, a.rope_row, shared + warp*a.n_embd);
                }
            }
        }
        float sq = 0.0f;
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            sq += x[p].x*x[p].x + x[p].y*x[p].y;
        }
        const float inv  = 1.0f/(sqrtf(warp_reduce_sum(sq)) + 1e-8f);
        const int64_t at = (int64_t) jh*s.n_pad + j;
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int    e = 2*lane + 64*p;
            const float2 u = make_float2(x[p].x*inv, x[p].y*inv);
            if (unrotated) {
                if (e < a.n_embd) {
                    *(float2 *) (s.unit_f + at*a.n_embd + e) = u;
                }
            } else {
                if (s.unit_h && e < s.d_pad) {
                    *(half2 *) (s.unit_h + at*s.d_pad + e) = make_half2(__float2half(u.x), __float2half(u.y));
                }
                sum[p].x += u.x;
                sum[p].y += u.y;
            }
        }
        if (!unrotated && lane == 0) {
            s.inv[at] = inv;
            if (s.spared) {
                s.spared[at] = 0;
            }
        }
    }
    if constexpr (!unrotated) {
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            if (e < a.n_embd) {
                shared[warp*a.n_embd + e]     = sum[p].x;
                shared[warp*a.n_embd + e + 1] = sum[p].y;
            }
        }
        __syncthreads();
        for (int e = warp*WARP_SIZE + lane; e < a.n_embd; e += KEY_WARPS*WARP_SIZE) {
            float total = 0.0f;
            for (int w = 0; w < KEY_WARPS; ++w) {
                total += shared[w*a.n_embd + e];
            }
            s.partial[((int64_t) jh*s.n_tile + tile)*a.n_embd + e] = total;
        }
    }
}

// sum of a key's cosines: its product with the sum of all keys, less its own; keydiff: minus its cosine to that sum
template <int type, int NP>
static __global__ void __launch_bounds__(KEY_WARPS*WARP_SIZE) rkv_sums(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int jh = blockIdx.z*a.n_head_kv + head;
    const int n  = rkv_n_cells(job);
    if (tile*RKV_CUDA_TILE >= n) {
        return;
    }
    const int n_tile = (n + RKV_CUDA_TILE - 1)/RKV_CUDA_TILE;
    extern __shared__ float shared[]; // [n_embd]
    const float * partial = s.partial + (int64_t) jh*s.n_tile*a.n_embd;
    for (int e = warp*WARP_SIZE + lane; e < a.n_embd; e += KEY_WARPS*WARP_SIZE) {
        float sum = 0.0f;
#pragma unroll 8
        for (int t = 0; t < n_tile; ++t) {
            sum += partial[(int64_t) t*a.n_embd + e];
        }
        shared[e] = sum;
    }
    __syncthreads();
    float2 total[NP];
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        const int e = 2*lane + 64*p;
        total[p] = e < a.n_embd ? make_float2(shared[e], shared[e + 1]) : make_float2(0.0f, 0.0f);
    }
    const bool difference = a.par.policy == RKV_POLICY_KEYDIFF;
    float factor = 1.0f, own = 1.0f;
    if (difference) {
        float sq = 0.0f;
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            sq += total[p].x*total[p].x + total[p].y*total[p].y;
        }
        factor = -1.0f/(sqrtf(warp_reduce_sum(sq)) + 1e-8f);
        own    = 0.0f;
    }
    const char  * keys = rkv_key(a, job, head, 0);
    const float * inv  = s.inv + (int64_t) jh*s.n_pad;
    float sums[RKV_CUDA_TILE/KEY_WARPS];
#pragma unroll
    for (int c = 0; c < RKV_CUDA_TILE/KEY_WARPS; ++c) {
        const int j = min(tile*RKV_CUDA_TILE + c*KEY_WARPS + warp, n - 1); // no branches: the loads shall not wait for each other
        const float u = inv[j];
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            const float2 x = e < a.n_embd ? rkv_load2<type>(a.type_k, keys + j*a.k_cell, e) : make_float2(0.0f, 0.0f);
            const float x0 = x.x*u, x1 = x.y*u;
            sum += x0*(total[p].x - own*x0) + x1*(total[p].y - own*x1);
        }
        sums[c] = sum;
    }
#pragma unroll
    for (int c = 0; c < RKV_CUDA_TILE/KEY_WARPS; ++c) {
        const float sum = warp_reduce_sum(sums[c]);
        if (lane == 0) {
            s.m[(int64_t) jh*s.n_pad + tile*RKV_CUDA_TILE + c*KEY_WARPS + warp] = factor*sum;
        }
    }
}

template <int NP>
static void launch_keys(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    const dim3 grid(s.n_tile, a.n_head_kv, n_jobs), block(WARP_SIZE, KEY_WARPS);
    const size_t shared = sizeof(float)*KEY_WARPS*a.n_embd;
    rkv_with_type(a.type_k, [&](auto type) {
        if (a.par.policy == RKV_POLICY_LATEST) {
            rkv_keys<decltype(type)::value, NP, true><<<grid, block, shared, stream>>>(a, s);
        } else {
            rkv_keys<decltype(type)::value, NP, false><<<grid, block, shared, stream>>>(a, s);
            rkv_sums<decltype(type)::value, NP><<<grid, block, sizeof(float)*a.n_embd, stream>>>(a, s);
        }
    });
}

static void keys(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    switch ((a.n_embd + 63)/64) {
        case 1:  launch_keys<1>(a, s, n_jobs, stream); break;
        case 2:  launch_keys<2>(a, s, n_jobs, stream); break;
        case 3:
        case 4:  launch_keys<4>(a, s, n_jobs, stream); break;
        default: launch_keys<9>(a, s, n_jobs, stream); break;
    }
}

//
// logits: the largest product of a key with the window's queries of its group, one row per query
//

static constexpr int LOGIT_ROWS = 32, LOGIT_K = 32, LOGIT_THREADS = 128;

template <int type>
static __global__ void __launch_bounds__(LOGIT_THREADS) rkv_logits(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int tile = blockIdx.x, head = blockIdx.y, tid = threadIdx.x;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int n_cand = rkv_n_cells(job) - a.par.window;
    if (tile*RKV_CUDA_TILE >= n_cand) {
        return;
    }
    __shared__ float ks[LOGIT_K][RKV_CUDA_TILE + 1];
    __shared__ __align__(16) float qs[LOGIT_K][LOGIT_ROWS + 4];
    __shared__ int slots[RKV_MAX_WINDOW + 1];

    if (tid == 0) {
        const uint32_t lo = job[RKV_JOB_QUERY_LO], hi = job[RKV_JOB_QUERY_HI];
        int n_query = 0;
        for (int slot = 0; slot < a.par.window; ++slot) {
            if ((slot < 32 ? lo : hi) >> slot%32 & 1) {
                slots[n_query++] = slot;
            }
        }
        slots[RKV_MAX_WINDOW] = n_query;
    }
    __syncthreads();
    const int n_row = slots[RKV_MAX_WINDOW]*a.n_group; // row r: query r/n_group, head r%n_group of the group
    float * out = s.logits + (int64_t) (blockIdx.z*a.n_head_kv + head)*a.par.window*s.n_pad + tile*RKV_CUDA_TILE;
    const float * q = a.q + job[RKV_JOB_STREAM]*a.q_stream + head*a.q_head;
    const char * keys = rkv_key(a, job, head, tile*RKV_CUDA_TILE);

    const int tx = tid%16, ty = tid/16;  // 4 rows from 4*ty, cells tx, tx + 16, ..
    const int le = 2*tx, lr = tid/LOGIT_K, lq = tid%LOGIT_K; // what this thread loads: elements of keys; rows and element of queries
    for (int r0 = 0; r0 < n_row; r0 += LOGIT_ROWS) {
        const float * q_row[LOGIT_ROWS*LOGIT_K/LOGIT_THREADS];
#pragma unroll
        for (int i = 0; i < LOGIT_ROWS*LOGIT_K/LOGIT_THREADS; ++i) {
            const int row = min(r0 + lr + i*(LOGIT_THREADS/LOGIT_K), n_row - 1); // rows past the last are not looked at
            q_row[i] = q + slots[row/a.n_group]*a.q_slot + (row%a.n_group)*a.n_embd + lq;
        }
        float acc[4][4] = {};
        for (int k0 = 0; k0 < a.n_embd; k0 += LOGIT_K) {
            float2 kv[RKV_CUDA_TILE*LOGIT_K/2/LOGIT_THREADS];
            float  qv[LOGIT_ROWS*LOGIT_K/LOGIT_THREADS];
#pragma unroll
            for (int i = 0; i < RKV_CUDA_TILE*LOGIT_K/2/LOGIT_THREADS; ++i) {
                const int c = ty + i*(LOGIT_THREADS/16);
                kv[i] = tile*RKV_CUDA_TILE + c < n_cand && k0 + le < a.n_embd ?
                    rkv_load2<type>(a.type_k, keys + c*a.k_cell, k0 + le) : make_float2(0.0f, 0.0f);
            }
#pragma unroll
            for (int i = 0; i < LOGIT_ROWS*LOGIT_K/LOGIT_THREADS; ++i) {
                qv[i] = k0 + lq < a.n_embd ? q_row[i][k0] : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < RKV_CUDA_TILE*LOGIT_K/2/LOGIT_THREADS; ++i) {
                ks[le][ty + i*(LOGIT_THREADS/16)]     = kv[i].x;
                ks[le + 1][ty + i*(LOGIT_THREADS/16)] = kv[i].y;
            }
#pragma unroll
            for (int i = 0; i < LOGIT_ROWS*LOGIT_K/LOGIT_THREADS; ++i) {
                qs[lq][lr + i*(LOGIT_THREADS/LOGIT_K)] = qv[i];
            }
            __syncthreads();
#pragma unroll 8
            for (int e = 0; e < LOGIT_K; ++e) {
                const float4 qv = *(const float4 *) &qs[e][4*ty];
                const float qr[4] = { qv.x, qv.y, qv.z, qv.w };
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float kv = ks[e][tx + 16*c];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        acc[r][c] += qr[r]*kv;
                    }
                }
            }
        }
        __syncthreads();
        static_assert(LOGIT_ROWS <= LOGIT_K, "the products take the keys' place");
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                ks[4*ty + r][tx + 16*c] = acc[r][c];
            }
        }
        __syncthreads();
        const int r1 = min(r0 + LOGIT_ROWS, n_row);
        const int i0 = r0/a.n_group, i1 = (r1 - 1)/a.n_group;
        for (int it = tid; it < (i1 - i0 + 1)*RKV_CUDA_TILE; it += LOGIT_THREADS) {
            const int i = i0 + it/RKV_CUDA_TILE, c = it%RKV_CUDA_TILE;
            const int first = max(i*a.n_group, r0), last = min((i + 1)*a.n_group, r1);
            float top = ks[first - r0][c];
            for (int r = first + 1; r < last; ++r) {
                top = fmaxf(top, ks[r - r0][c]);
            }
            float & dst = out[(int64_t) i*s.n_pad + c];
            if (first > i*a.n_group) {
                top = fmaxf(dst, top); // the query's rows began in an earlier round
            }
            if (last == (i + 1)*a.n_group) {
                top *= a.par.scale;
                if (a.par.softcap > 0.0f) {
                    top = a.par.softcap*(float) tanh((double) (top/a.par.softcap)); // -use_fast_math's tanhf has 11 bits
                }
            }
            dst = top;
        }
    }
}

//
// the formulas
//

static constexpr int FINISH_WARPS = 16;

static __device__ __forceinline__ int rkv_n_query(const rkv_cuda_score_args & a, const int32_t * job) {
    const uint32_t slots_lo = job[RKV_JOB_QUERY_LO], slots_hi = job[RKV_JOB_QUERY_HI];
    const uint64_t in_window = a.par.window == 64 ? ~0ull : (1ull << a.par.window) - 1;
    return __popcll((slots_lo | (uint64_t) slots_hi << 32) & in_window);
}

// softmax of each query's logits over cells [first, n_cand), by a warp: its maximum and one over its sum
static __device__ void softmax_units(const float * logits, int n_pad, int n_query, int first, int n_cand, float * top, float * unit) {
    const int lane = threadIdx.x;
    for (int i = threadIdx.y; i < n_query; i += FINISH_WARPS) {
        const float * x = logits + (int64_t) i*n_pad;
        float most = -INFINITY;
#pragma unroll 8
        for (int j = first + lane; j < n_cand; j += WARP_SIZE) {
            most = fmaxf(most, x[j]);
        }
        most = warp_reduce_max(most);
        float total = 0.0f;
#pragma unroll 4
        for (int j = first + lane; j < n_cand; j += WARP_SIZE) {
            total += rkv_exp(x[j] - most);
        }
        total = warp_reduce_sum(total);
        if (lane == 0) {
            top [i] = most;
            unit[i] = 1.0f/total;
        }
    }
    __syncthreads();
}

static __device__ __forceinline__ float attention_to(const float * logits, int n_pad, int n_query, int j, const float * top,
        const float * unit, float weight) {
    float total = 0.0f;
#pragma unroll 4
    for (int i = 0; i < n_query; ++i) {
        total += rkv_exp(logits[(int64_t) i*n_pad + j] - top[i])*unit[i]*weight;
    }
    return total;
}

// I of cell j < n, or what is left of the one that was stored with it; stored
static __device__ __forceinline__ float remember(const rkv_cuda_score_args & a, float x, float & stored, int j, int n_old, int n_cand) {
    const float before = j < n_old ? stored : 0.0f;
    const float faded  = a.par.memory*before;
    x = j < n_old && x < faded ? faded : x;
    stored = j < n_cand ? x : before;
    return x;
}

static __device__ __forceinline__ uint32_t mix(uint32_t x) { // as in cpu/policy-value-aware.cpp
    x = (x ^ x >> 16)*0x85ebca6bu;
    x = (x ^ x >> 13)*0xc2b2ae35u;
    return x ^ x >> 16;
}

static __device__ __forceinline__ float gumbel(uint32_t seed, uint32_t layer, uint32_t head, uint32_t pos) {
    uint32_t x = mix(seed*0x9e3779b9u + layer);
    x = mix(x*0x9e3779b9u + head);
    x = mix(x*0x9e3779b9u + pos);
    const float u = ((x >> 9) + 0.5f)*(1.0f/8388608.0f);
    const float y = (float) -log((double) u); // the logarithms of -use_fast_math lose most where u is close to 1
    return (float) -log((double) y);
}

// The n_long longest of N[0..n), the first of those that are equally long, get z = RKV_KEPT_SCORE.
static __device__ void keep_longest(const float * N, float * z, int n, int n_long, int * shared) {
    const int tid = threadIdx.y*WARP_SIZE + threadIdx.x, n_thread = FINISH_WARPS*WARP_SIZE;
    const auto plus  = [](int x, int y) { return x + y; };
    const auto key   = [&](int j) { return __float_as_uint(N[j]); }; // of a float that is not negative: in the same order
    const auto count = [&](uint32_t least) {
        int mine = 0;
        for (int j = tid; j < n; j += n_thread) {
            mine += key(j) >= least;
        }
        return rkv_block_reduce<FINISH_WARPS>(mine, shared, plus);
    };
    uint32_t last = 0; // the largest that n_long of them reach
    for (int bit = 30; bit >= 0; --bit) {
        if (count(last | 1u << bit) >= n_long) {
            last |= 1u << bit;
        }
    }
    const int n_equal = n_long - count(last + 1); // of those that are just as long
    for (int j = tid; j < n; j += n_thread) {
        bool in = key(j) > last;
        if (key(j) == last) {
            int before = 0;
            for (int i = 0; i < j && before < n_equal; ++i) {
                before += key(i) == last;
            }
            in = before < n_equal;
        }
        if (in) {
            z[j] = RKV_KEPT_SCORE;
        }
    }
}

static __global__ void __launch_bounds__(FINISH_WARPS*WARP_SIZE) rkv_finish(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int head = blockIdx.x, lane = threadIdx.x, warp = threadIdx.y;
    const int tid = warp*WARP_SIZE + lane, n_thread = FINISH_WARPS*WARP_SIZE;
    const int32_t * job = a.jobs[s.job0 + blockIdx.y];
    const int jh     = blockIdx.y*a.n_head_kv + head;
    const int n      = rkv_n_cells(job);
    const int n_cand = n - a.par.window;
    const int n_old  = job[RKV_JOB_OLD_END] - job[RKV_JOB_BEGIN];
    const int pin    = job[RKV_JOB_PIN];
    if (n_cand <= 0) {
        return;
    }
    float * z   = a.dst + (s.job0 + blockIdx.y)*a.dst_job + head*a.dst_head;
    float * m   = s.m    + (int64_t) jh*s.n_pad;
    float * aux = a.aux + job[RKV_JOB_STREAM]*a.aux_stream + head*a.aux_head + job[RKV_JOB_BEGIN]*a.aux_cell;
    const int policy = a.par.policy;
    switch (policy) { // those that do not look at queries
        case RKV_POLICY_STREAMING:
            for (int j = tid; j < n_cand; j += n_thread) {
                z[j] = j;
            }
            return;
        case RKV_POLICY_GIVEN:
            for (int j = tid; j < n_cand; j += n_thread) {
                z[j] = aux[j*a.aux_cell];
            }
            return;
        case RKV_POLICY_KEYDIFF:
            for (int j = tid; j < n_cand; j += n_thread) {
                z[j] = m[j];
            }
            return;
    }
    __shared__ float shared[FINISH_WARPS];
    __shared__ int   shared_count[FINISH_WARPS];
    __shared__ float top[RKV_MAX_WINDOW], unit[RKV_MAX_WINDOW];
    const auto larger = [](float x, float y) { return fmaxf(x, y); };
    const auto plus   = [](float x, float y) { return x + y; };

    const int n_query = rkv_n_query(a, job);
    const float * logits = s.logits + (int64_t) jh*a.par.window*s.n_pad;
    softmax_units(logits, s.n_pad, n_query, 0, n_cand, top, unit);
    const float weight = 1.0f/n_query;
    float * mean = s.mean + (int64_t) jh*s.n_pad;
    for (int j = tid; j < n_cand; j += n_thread) {
        mean[j] = attention_to(logits, s.n_pad, n_query, j, top, unit, weight);
    }
    if (policy == RKV_POLICY_H2O) {
        for (int j = tid; j < n; j += n_thread) {
            float total = j < n_old ? aux[j*a.aux_cell] : 0.0f;
            if (j < n_cand) {
                total += n_query*mean[j];
                z[j] = total;
            }
            aux[j*a.aux_cell] = total;
        }
        return;
    }
    __syncthreads();
    const int reach = a.par.pool/2;
    const auto importance = [&](int j) {
        const int lo = max(0, j - reach), hi = min(n_cand - 1, j + reach);
        float top = mean[lo];
        for (int i = lo + 1; i <= hi; ++i) {
            top = fmaxf(top, mean[i]);
        }
        return top;
    };
    const auto peak_of = [&](const float * x) { // x[j] of this thread's cells
        float peak = -INFINITY;
        for (int j = tid; j < n_cand; j += n_thread) {
            peak = fmaxf(peak, x[j]);
        }
        peak = rkv_block_reduce<FINISH_WARPS>(peak, shared, larger);
        return peak > 0.0f ? 1.0f/peak : 0.0f;
    };

    // I takes z's place until the end; a cell is one thread's
    const bool gkv = policy == RKV_POLICY_GKV;
    const float scale = gkv ? peak_of(mean) : 1.0f; // pooling does not change the maximum
    for (int j = tid; j < n_cand; j += n_thread) {
        z[j] = importance(j)*scale;
    }
    if (gkv || (a.par.memory > 0.0f && (policy == RKV_POLICY_RKV || policy == RKV_POLICY_SNAPKV || policy == RKV_POLICY_LATEST))) {
        const int slot = policy == RKV_POLICY_LATEST ? a.par.n_sim : 0;
        for (int j = tid; j < n; j += n_thread) {
            const float x = remember(a, j < n_cand ? z[j] : 0.0f, aux[j*a.aux_cell + slot], j, n_old, n_cand);
            if (j < n_cand) {
                z[j] = x;
            }
        }
    }

    const float lambda = a.par.lambda;
    switch (policy) {
        case RKV_POLICY_RKV:
        case RKV_POLICY_GKV: {
            const unsigned long long * spared = s.spared + (int64_t) jh*s.n_pad;
            float most = -INFINITY;
            for (int j = tid; j < n; j += n_thread) {
                m[j] = (m[j] - (float) (long long) spared[j]*(1.0f/RKV_SPARED_UNIT))*(1.0f/n);
                most = fmaxf(most, m[j]);
            }
            most = rkv_block_reduce<FINISH_WARPS>(most, shared, larger);
            float total = 0.0f;
            for (int j = tid; j < n; j += n_thread) {
                m[j] = rkv_exp(m[j] - most);
                total += m[j];
            }
            total = rkv_block_reduce<FINISH_WARPS>(total, shared, plus);
            const float by_peak = gkv ? peak_of(m) : 0.0f; // R/max(R) needs no sum
            for (int j = tid; j < n_cand; j += n_thread) {
                z[j] = lambda*z[j] - (1.0f - lambda)*(gkv ? m[j]*by_peak : m[j]/total);
            }
        } break;
        case RKV_POLICY_LATEST: {
            const float by_peak = peak_of(z);
            for (int j = tid; j < n_cand; j += n_thread) {
                z[j] = lambda*z[j]*by_peak - (1.0f - lambda)*m[j];
            }
        } break;
        case RKV_POLICY_CHUNKKV: {
            __syncthreads();
            for (int j = tid; j < min(pin, n_cand); j += n_thread) {
                z[j] = 0.0f;
            }
            const int n_chunk = a.par.chunk;
            for (int first = pin + warp*n_chunk; first < n_cand; first += FINISH_WARPS*n_chunk) {
                const int last = min(first + n_chunk, n_cand);
                double total = 0.0;
                for (int j = first + lane; j < last; j += WARP_SIZE) {
                    total += z[j];
                }
#pragma unroll
                for (int offset = WARP_SIZE/2; offset > 0; offset /= 2) {
                    total += __shfl_xor_sync(0xffffffff, total, offset, WARP_SIZE);
                }
                const float mean_of_chunk = (float) (total/(last - first));
                for (int j = first + lane; j < last; j += WARP_SIZE) {
                    z[j] = mean_of_chunk;
                }
            }
        } break;
        case RKV_POLICY_VALUE_AWARE: {
            const int32_t * pos = a.pos + job[RKV_JOB_STREAM]*a.pos_stream + head*a.pos_head + job[RKV_JOB_BEGIN];
            for (int j = tid; j < n_cand; j += n_thread) {
                const float I = z[j] < 1e-20f ? 1e-20f : z[j];
                z[j] = j < pin ? 0.0f : (float) log((double) I) + gumbel(a.par.seed, a.par.layer, a.head0 + head, pos[j]);
            }
            const int n_free = max(0, n_cand - pin);
            const int n_slot = min(max(job[RKV_JOB_KEEP] - a.par.window - pin, 0), n_free);
            const int n_long = (int) (a.par.value_share*n_slot + 0.5f);
            if (n_long > 0) { // its counts are barriers: what follows them may write another thread's z
                keep_longest(m + pin, z + pin, n_free, n_long, shared_count);
            }
        } break;
        default: // SnapKV
            break;
    }
}

//
// lagkv: deviations as a softmax over their chunk
//

static __global__ void __launch_bounds__(FINISH_WARPS*WARP_SIZE) rkv_finish_lag(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int head = blockIdx.x, lane = threadIdx.x, warp = threadIdx.y;
    const int tid = warp*WARP_SIZE + lane, n_thread = FINISH_WARPS*WARP_SIZE;
    const int32_t * job = a.jobs[s.job0 + blockIdx.y];
    const int64_t at = (int64_t) (blockIdx.y*a.n_head_kv + head)*s.n_pad;
    const int n = rkv_n_cells(job), n_cand = n - a.par.window, pin = job[RKV_JOB_PIN];
    if (n_cand <= 0) {
        return;
    }
    float * z = a.dst + (s.job0 + blockIdx.y)*a.dst_job + head*a.dst_head;
    const float * k = s.m + at, * v = s.mean + at;
    const int n_chunk = rkv_lag_chunk(a, job);
    const int scored  = pin + max(0, (n - pin)/n_chunk - 1)*n_chunk;

    for (int j = tid; j < n_cand; j += n_thread) {
        if (j < pin || j >= scored) {
            z[j] = j < pin ? 0.0f : 2.0f + (float) j/n;
        }
    }
    for (int first = pin + warp*n_chunk; first < scored; first += FINISH_WARPS*n_chunk) {
        float top_k = -INFINITY, top_v = -INFINITY, total_k = 0.0f, total_v = 0.0f;
        for (int j = first + lane; j < first + n_chunk; j += WARP_SIZE) {
            top_k = fmaxf(top_k, k[j]);
            top_v = fmaxf(top_v, v[j]);
        }
        top_k = warp_reduce_max(top_k);
        top_v = warp_reduce_max(top_v);
        for (int j = first + lane; j < first + n_chunk; j += WARP_SIZE) {
            total_k += rkv_exp(k[j] - top_k);
            total_v += rkv_exp(v[j] - top_v);
        }
        total_k = warp_reduce_sum(total_k);
        total_v = warp_reduce_sum(total_v);
        for (int j = first + lane; j < min(first + n_chunk, n_cand); j += WARP_SIZE) {
            z[j] = rkv_exp(k[j] - top_k)/total_k + rkv_exp(v[j] - top_v)/total_v;
        }
    }
}

//
// rpc: attention of one query head of each group at a time, added up in z; then over the layer's heads, and mean-pooled
//

static __global__ void __launch_bounds__(FINISH_WARPS*WARP_SIZE) rkv_add_attention(const rkv_cuda_score_args a, const rkv_cuda_scratch s,
        bool is_first, float share) {
    const int head = blockIdx.x, tid = threadIdx.y*WARP_SIZE + threadIdx.x;
    const int32_t * job = a.jobs[s.job0 + blockIdx.y];
    const int n_cand = rkv_n_cells(job) - a.par.window, pin = job[RKV_JOB_PIN];
    if (n_cand <= 0) {
        return;
    }
    __shared__ float top[RKV_MAX_WINDOW], unit[RKV_MAX_WINDOW];
    float * z = a.dst + (s.job0 + blockIdx.y)*a.dst_job + head*a.dst_head;
    const float * logits = s.logits + (int64_t) (blockIdx.y*a.n_head_kv + head)*a.par.window*s.n_pad;
    const int n_query = rkv_n_query(a, job);
    softmax_units(logits, s.n_pad, n_query, pin, n_cand, top, unit);
    for (int j = tid; j < n_cand; j += FINISH_WARPS*WARP_SIZE) {
        const float x = j < pin ? 0.0f : attention_to(logits, s.n_pad, n_query, j, top, unit, share/n_query);
        z[j] = is_first ? x : z[j] + x;
    }
}

static __global__ void __launch_bounds__(FINISH_WARPS*WARP_SIZE) rkv_pool_layer(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int tid = threadIdx.y*WARP_SIZE + threadIdx.x, n_thread = FINISH_WARPS*WARP_SIZE;
    const int32_t * job = a.jobs[s.job0 + blockIdx.x];
    const int n_cand = rkv_n_cells(job) - a.par.window, pin = job[RKV_JOB_PIN];
    float * z    = a.dst + (s.job0 + blockIdx.x)*a.dst_job;
    float * mean = s.mean + (int64_t) blockIdx.x*s.n_pad;
    for (int j = tid; j < n_cand; j += n_thread) {
        float total = 0.0f;
        for (int h = 0; h < a.n_head_kv; ++h) {
            total += z[h*a.dst_head + j];
        }
        mean[j] = total;
    }
    __syncthreads();
    const int reach = a.par.pool/2;
    for (int j = tid; j < n_cand; j += n_thread) {
        double total = 0.0;
        for (int i = max(pin, j - reach); i <= min(n_cand - 1, j + reach); ++i) {
            total += mean[i];
        }
        const float x = j < pin ? 0.0f : (float) (total/a.par.pool);
        for (int h = 0; h < a.n_head_kv; ++h) {
            z[h*a.dst_head + j] = x;
        }
    }
}

//
// one job's share of the scratch memory, and the launches
//

// within rkv_score_scratch() for each head of each job
static void layout(const rkv_cuda_score_args & a, int n_jobs, char * base, rkv_cuda_scratch & s) {
    const int  policy = a.par.policy;
    const bool copies = rkv_searches_copies(policy), latest = policy == RKV_POLICY_LATEST, sums = copies || policy == RKV_POLICY_KEYDIFF;
    s.n_tile = (a.n_cells + RKV_CUDA_TILE - 1)/RKV_CUDA_TILE;
    s.n_pad  = s.n_tile*RKV_CUDA_TILE;
    s.d_pad  = (a.n_embd + 15)/16*16;

    const size_t cells = (size_t) n_jobs*a.n_head_kv*s.n_pad;
    size_t used = 0;
    const auto take = [&](size_t bytes) {
        char * p = bytes > 0 ? base + used : nullptr;
        used += (bytes + 255)/256*256;
        return p;
    };
    s.unit_h  = (half  *) take(copies ? cells*s.d_pad*sizeof(half) : 0);
    s.unit_f  = (float *) take(latest ? cells*a.n_embd*sizeof(float) : 0);
    s.logits  = (float *) take(rkv_asks_queries(policy) ? cells*a.par.window*sizeof(float) : 0);
    s.mean    = (float *) take(rkv_asks_queries(policy) || policy == RKV_POLICY_LAGKV ? cells*sizeof(float) : 0);
    s.inv     = (float *) take(sums ? cells*sizeof(float) : 0);
    s.m       = (float *) take(sums || latest || rkv_needs_values(&a.par) || policy == RKV_POLICY_TRIATTENTION ? cells*sizeof(float) : 0);
    s.series  = (float *) take(policy == RKV_POLICY_TRIATTENTION ? (size_t) n_jobs*a.n_head_kv*(a.n_embd + a.n_embd/2)*sizeof(float) : 0);
    s.partial = (float *) take(sums ? cells/RKV_CUDA_TILE*a.n_embd*sizeof(float) : 0);
    s.spared  = (unsigned long long *) take(copies ? cells*sizeof(unsigned long long) : 0);
}

// how many jobs, and how many heads of them, share the memory at a time
struct rkv_turns { int n_jobs, n_heads; };

static rkv_turns turns_of(const rkv_cuda_score_args & a) {
    const char * text = getenv("RKV_CUDA_SCRATCH"); // bytes, for tests
    const size_t most = text ? strtoull(text, nullptr, 10) : RKV_SCRATCH_MAX;
    const size_t head = rkv_score_scratch(&a.par, a.n_cells, a.n_embd);
    const size_t fit  = std::max<size_t>(1, most/std::max<size_t>(1, head));
    const int n_heads = std::min<size_t>(a.n_head_kv, fit);
    return { n_heads < a.n_head_kv ? 1 : (int) std::min<size_t>(a.jobs.n, fit/n_heads), n_heads };
}

size_t rkv_cuda_score_scratch(const rkv_cuda_score_args & a) {
    const rkv_turns turns = turns_of(a);
    return rkv_score_scratch(&a.par, a.n_cells, a.n_embd)*turns.n_jobs*turns.n_heads;
}

bool rkv_cuda_type_supported(int type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_IQ4_NL:
            return true;
        default:
            return false;
    }
}

// heads [head0, head0 + n_heads) of a
static rkv_cuda_score_args heads_of(const rkv_cuda_score_args & a, int head0, int n_heads) {
    rkv_cuda_score_args h = a;
    h.n_head_kv = n_heads;
    h.k   += head0*a.k_head;
    h.q   += head0*a.q_head;
    h.pos += head0*a.pos_head;
    h.aux += h.aux ? head0*a.aux_head : 0;
    h.v   += h.v ? head0*a.v_head : 0;
    h.dst += head0*a.dst_head;
    h.stats += h.stats ? (int64_t) head0*a.n_group*a.stats_head : 0;
    h.head0 = head0;
    return h;
}

static void logits(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    rkv_with_type(a.type_k, [&](auto type) {
        rkv_logits<decltype(type)::value><<<dim3(s.n_tile, a.n_head_kv, n_jobs), LOGIT_THREADS, 0, stream>>>(a, s);
    });
}

static void score_some(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, rkv_cuda_device device, cudaStream_t stream) {
    const dim3 finish_grid(a.n_head_kv, n_jobs), finish_block(WARP_SIZE, FINISH_WARPS);
    switch (a.par.policy) {
        case RKV_POLICY_TRIATTENTION:
            rkv_cuda_trigonometric(a, s, n_jobs, stream);
            return;
        case RKV_POLICY_LAGKV:
            rkv_cuda_lag(a, s, n_jobs, stream);
            rkv_finish_lag<<<finish_grid, finish_block, 0, stream>>>(a, s);
            return;
        case RKV_POLICY_RPC:
            for (int g = 0; g < a.n_group; ++g) { // each query head by itself
                rkv_cuda_score_args one = a;
                one.q      += (int64_t) g*a.n_embd;
                one.n_group = 1;
                logits(one, s, n_jobs, stream);
                rkv_add_attention<<<finish_grid, finish_block, 0, stream>>>(one, s, g == 0, 1.0f/(a.n_group*a.par.n_head_kv));
            }
            return;
    }
    if (rkv_asks_queries(a.par.policy)) {
        logits(a, s, n_jobs, stream);
    }
    switch (a.par.policy) {
        case RKV_POLICY_RKV:
        case RKV_POLICY_GKV:
            keys(a, s, n_jobs, stream);
            rkv_cuda_search(a, s, n_jobs, device, stream);
            break;
        case RKV_POLICY_LATEST:
            keys(a, s, n_jobs, stream);
            rkv_cuda_later(a, s, n_jobs, stream);
            break;
        case RKV_POLICY_KEYDIFF:
            keys(a, s, n_jobs, stream);
            break;
        case RKV_POLICY_VALUE_AWARE:
            rkv_cuda_lengths(a, s, n_jobs, stream);
            break;
    }
    rkv_finish<<<finish_grid, finish_block, 0, stream>>>(a, s);
    if (a.par.policy == RKV_POLICY_LATEST && a.par.value_weight > 0.0f) {
        rkv_cuda_add_values(a, s, n_jobs, stream);
    }
}

void rkv_cuda_score(const rkv_cuda_score_args & a, char * scratch, rkv_cuda_device device, cudaStream_t stream) {
    const rkv_turns turns = turns_of(a);
    for (int job0 = 0; job0 < a.jobs.n; job0 += turns.n_jobs) {
        const int n_jobs = std::min(turns.n_jobs, a.jobs.n - job0);
        rkv_cuda_scratch s = {};
        for (int head0 = 0; head0 < a.n_head_kv; head0 += turns.n_heads) {
            const rkv_cuda_score_args part = heads_of(a, head0, std::min(turns.n_heads, a.n_head_kv - head0));
            layout(part, turns.n_jobs, scratch, s);
            s.job0 = job0;
            score_some(part, s, n_jobs, device, stream);
        }
        if (a.par.policy == RKV_POLICY_RPC) {
            rkv_pool_layer<<<n_jobs, dim3(WARP_SIZE, FINISH_WARPS), 0, stream>>>(a, s);
        }
    }
    CUDA_CHECK(cudaGetLastError());
}
