// Redundancy: a key's sum of cosines, linear in the number of keys, and for each key the search for its most recent
// copy. The search multiplies keys that are rounded to 16 bits, tile by tile from the newest back; whatever comes within
// the rounding's reach of the threshold is multiplied again in float32, so that nothing is decided by rounded keys.

#include "rkv-score.cuh"
#include "rkv-dequant.cuh"

#include "cp-async.cuh"
#include "mma.cuh"

static constexpr int   SEARCH_K     = 64;              // elements of a tile that are in shared memory at a time
static constexpr int   STRIDE_B     = SEARCH_K + 8;    // halves; odd multiples of 16 bytes have no bank conflicts
// two factors rounded by 2^-11 each, of vectors not longer than 1, and float32 sums
static constexpr float ROUNDING     = 1.1e-3f;

// of a block of n_warp warps, 32 keys each that look for their copies
static size_t shared_bytes(int n_warp, int d_pad, int n_embd) {
    return sizeof(half)*((size_t) 32*n_warp*(d_pad + 8) + 2*RKV_CUDA_TILE*STRIDE_B) + sizeof(uint32_t)*64*n_warp + sizeof(float)*n_embd;
}

// cosine of two keys by a warp
static __device__ float exact_cosine(const rkv_cuda_score_args & a, const int32_t * job, int head, const float * inv, int i, int j) {
    const char * ki = rkv_key(a, job, head, i);
    const char * kj = rkv_key(a, job, head, j);
    const float  ui = inv[i], uj = inv[j];
    float sum = 0.0f;
    for (int e = 2*threadIdx.x; e < a.n_embd; e += 2*WARP_SIZE) {
        const float2 x = rkv_load2(a.type_k, ki, e), y = rkv_load2(a.type_k, kj, e);
        sum += (x.x*ui)*(y.x*uj) + (x.y*ui)*(y.y*uj);
    }
    return warp_reduce_sum(sum);
}

static __device__ __forceinline__ void copy_16(half * dst, const half * src) {
#ifdef CP_ASYNC_AVAILABLE
    cp_async_cg_16<0>(ggml_cuda_cvta_generic_to_shared(dst), src);
#else
    *(int4 *) dst = *(const int4 *) src;
#endif
}

static __device__ __forceinline__ void copies_done() {
#ifdef CP_ASYNC_AVAILABLE
    cp_async_wait_all();
#endif
}

template <int n_warp>
static __global__ void __launch_bounds__(n_warp*WARP_SIZE) rkv_search(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    constexpr int n_row = 32*n_warp;
    const int head = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const int tid  = warp*WARP_SIZE + lane, row0 = blockIdx.x*n_row;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int jh = blockIdx.z*a.n_head_kv + head;
    const int n  = rkv_n_cells(job);
    if (row0 >= n || n <= a.par.window) {
        return;
    }
    const int n_tile   = (n + RKV_CUDA_TILE - 1)/RKV_CUDA_TILE;
    const int n_chunk  = (s.d_pad + SEARCH_K - 1)/SEARCH_K;
    const int stride_a = s.d_pad + 8;

    extern __shared__ __align__(16) char shared[];
    half     * rows  = (half *) shared;                         // [n_row][stride_a]
    half     * cols  = rows + n_row*stride_a;             // two of [RKV_CUDA_TILE][STRIDE_B]
    uint32_t * hits  = (uint32_t *) (cols + 2*RKV_CUDA_TILE*STRIDE_B); // [n_row][2], a bit per key of the tile
    float    * total = (float *) (hits + 2*n_row);        // [n_embd]

    const int64_t at   = (int64_t) jh*s.n_pad;
    const half  * unit = s.unit_h + at*s.d_pad;
    const float * inv  = s.inv + at;

    // cells past the last tile are not in the scratch memory
    for (int it = tid; it < n_row*s.d_pad/8; it += n_warp*WARP_SIZE) {
        const int r = it/(s.d_pad/8), e = 8*(it%(s.d_pad/8));
        half * dst = rows + r*stride_a + e;
        if (row0 + r < n_tile*RKV_CUDA_TILE) {
            copy_16(dst, unit + (int64_t) (row0 + r)*s.d_pad + e);
        } else {
            *(int4 *) dst = make_int4(0, 0, 0, 0);
        }
    }
    const auto fetch = [&](int step) { // one chunk of one tile, newest tile first
        const int tile = n_tile - 1 - step/n_chunk, e0 = step%n_chunk*SEARCH_K;
        const int width = min(SEARCH_K, s.d_pad - e0)/8;
        half * dst = cols + step%2*RKV_CUDA_TILE*STRIDE_B;
        for (int it = tid; it < RKV_CUDA_TILE*width; it += n_warp*WARP_SIZE) {
            const int c = it/width, e = 8*(it%width);
            copy_16(dst + c*STRIDE_B + e, unit + (int64_t) (tile*RKV_CUDA_TILE + c)*s.d_pad + e0 + e);
        }
    };
    fetch(0);

    // sum of cosines: the product with the sum of all keys, less the key's own
    for (int e = tid; e < a.n_embd; e += n_warp*WARP_SIZE) {
        float x = 0.0f;
        for (int t = 0; t < n_tile; ++t) {
            x += s.partial[((int64_t) jh*s.n_tile + t)*a.n_embd + e];
        }
        total[e] = x;
    }
    hits[tid] = hits[tid + n_row] = 0;
    __syncthreads();
    for (int r = 0; r < 32 && row0 + 32*warp + r < n; ++r) {
        const int    i   = row0 + 32*warp + r;
        const char * key = rkv_key(a, job, head, i);
        const float  u   = inv[i];
        float sum = 0.0f;
        for (int e = 2*lane; e < a.n_embd; e += 2*WARP_SIZE) {
            const float2 x = rkv_load2(a.type_k, key, e);
            const float x0 = x.x*u, x1 = x.y*u;
            sum += x0*(total[e] - x0) + x1*(total[e + 1] - x1);
        }
        sum = warp_reduce_sum(sum);
        if (lane == 0) {
            s.m[at + i] = sum;
        }
    }

    bool found = row0 + tid >= n; // of key row0 + tid
    const auto spare = [&](int j, float c) { atomicAdd(s.spared + at + j, (unsigned long long) (long long) (c*RKV_SPARED_UNIT)); };
    const float close = a.par.threshold - ROUNDING;

    const int n_step = n_tile*n_chunk;
    using tile_d  = ggml_cuda_mma::tile<16, 16, float>;
    using tile_ab = ggml_cuda_mma::tile<16, 8, half2>;
#ifdef TURING_MMA_AVAILABLE
    tile_d acc[2][4];
#else
    float acc[32][2];
    GGML_UNUSED(stride_a);
#endif
    for (int step = 0; step < n_step; ++step) {
        copies_done();
        __syncthreads();
        if (step + 1 < n_step) {
            fetch(step + 1);
        }
        const int chunk = step%n_chunk, e0 = chunk*SEARCH_K, width = min(SEARCH_K, s.d_pad - e0);
        const bool searching = __any_sync(0xffffffff, !found);
        const half * tile = cols + step%2*RKV_CUDA_TILE*STRIDE_B;
#ifdef TURING_MMA_AVAILABLE
        if (chunk == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    acc[r][c] = tile_d();
                }
            }
        }
        for (int e = 0; e < width && searching; e += 16) {
            tile_ab x[2], y[4];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                ggml_cuda_mma::load_ldmatrix(x[r], (const half2 *) (rows + (32*warp + 16*r)*stride_a + e0 + e), stride_a/2);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                ggml_cuda_mma::load_ldmatrix(y[c], (const half2 *) (tile + 16*c*STRIDE_B + e), STRIDE_B/2);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    ggml_cuda_mma::mma(acc[r][c], x[r], y[c]);
                }
            }
        }
#else
#pragma unroll
        for (int r = 0; r < 32; ++r) {
            acc[r][0] = chunk == 0 ? 0.0f : acc[r][0];
            acc[r][1] = chunk == 0 ? 0.0f : acc[r][1];
        }
        for (int e = 0; e < width && searching; e += 2) {
            const float2 y0 = __half22float2(*(const half2 *) (tile + lane*STRIDE_B + e));
            const float2 y1 = __half22float2(*(const half2 *) (tile + (lane + 32)*STRIDE_B + e));
#pragma unroll
            for (int r = 0; r < 32; ++r) {
                const float2 x = __half22float2(*(const half2 *) (rows + (32*warp + r)*stride_a + e0 + e));
                acc[r][0] += x.x*y0.x + x.y*y0.y;
                acc[r][1] += x.x*y1.x + x.y*y1.y;
            }
        }
#endif
        if (chunk + 1 < n_chunk) {
            continue;
        }

        bool any = false;
#ifdef TURING_MMA_AVAILABLE
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int l = 0; l < tile_d::ne; ++l) {
                    if (acc[r][c].x[l] > close) {
                        const int col = 16*c + tile_d::get_j(l);
                        atomicOr(hits + 2*(32*warp + 16*r + tile_d::get_i(l)) + col/32, 1u << col%32);
                        any = true;
                    }
                }
            }
        }
#else
#pragma unroll
        for (int r = 0; r < 32; ++r) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (acc[r][c] > close) {
                    atomicOr(hits + 2*(32*warp + r) + c, 1u << lane);
                    any = true;
                }
            }
        }
#endif
        if (__any_sync(0xffffffff, any)) {
            __syncwarp();
            const int  first = (n_tile - 1 - step/n_chunk)*RKV_CUDA_TILE;
            uint2 mine = *(const uint2 *) (hits + 2*tid);
            if (found) {
                mine = make_uint2(0, 0);
            }
            const int open = (mine.x | mine.y) != 0;
            for (int r = 0; r < 32; ++r) {
                if (!__shfl_sync(0xffffffff, open, r, WARP_SIZE)) {
                    continue;
                }
                const uint32_t lo = __shfl_sync(0xffffffff, mine.x, r, WARP_SIZE), hi = __shfl_sync(0xffffffff, mine.y, r, WARP_SIZE);
                const int i = row0 + 32*warp + r;
                bool done = false;
                for (int h = 1; h >= 0 && !done; --h) {
                    for (uint32_t mask = h == 1 ? hi : lo; mask != 0 && !done;) {
                        const int bit = 31 - __clz(mask);
                        mask ^= 1u << bit;
                        const int j = first + 32*h + bit;
                        if (j >= n) {
                            continue;
                        }
                        const float c = i == j ? 0.0f : exact_cosine(a, job, head, inv, i, j); // the diagonal is 0
                        if (c > a.par.threshold) {
                            done = true;
                            if (lane == 0) {
                                spare(j, c);
                            }
                        }
                    }
                }
                found = found || (done && lane == r);
            }
            *(uint2 *) (hits + 2*tid) = make_uint2(0, 0);
            __syncwarp();
        }
        if (__syncthreads_and(found)) {
            break;
        }
    }
    copies_done(); // a block ends with no copy under way

    if (a.par.flags & RKV_FLAG_REFERENCE) {
        for (int r = 0; r < 32; ++r) {
            const int i = row0 + 32*warp + r;
            if (!__shfl_sync(0xffffffff, (int) found, r, WARP_SIZE)) { // the authors' code zeroes column 0
                const float c = i == 0 ? 0.0f : exact_cosine(a, job, head, inv, i, 0);
                if (lane == 0) {
                    spare(0, c);
                }
            }
        }
    }
}

template <int n_warp>
static void launch(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, size_t smpbo, cudaStream_t stream) {
    const dim3 grid((a.n_cells + 32*n_warp - 1)/(32*n_warp), a.n_head_kv, n_jobs), block(WARP_SIZE, n_warp);
    CUDA_SET_SHARED_MEMORY_LIMIT(rkv_search<n_warp>, smpbo);
    rkv_search<n_warp><<<grid, block, shared_bytes(n_warp, s.d_pad, a.n_embd), stream>>>(a, s);
}

bool rkv_cuda_search_supported(int n_embd, size_t smpbo) {
    return shared_bytes(1, (n_embd + 15)/16*16, n_embd) <= smpbo;
}

void rkv_cuda_search(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, size_t smpbo, cudaStream_t stream) {
    if (shared_bytes(4, s.d_pad, a.n_embd) <= smpbo) {
        launch<4>(a, s, n_jobs, smpbo, stream);
    } else if (shared_bytes(2, s.d_pad, a.n_embd) <= smpbo) {
        launch<2>(a, s, n_jobs, smpbo, stream);
    } else {
        launch<1>(a, s, n_jobs, smpbo, stream);
    }
}
