// For each key the search for its most recent copy. Keys that are rounded to 16 bits are multiplied, tile by tile from
// the newest back; whatever comes within the rounding's reach of the threshold is multiplied again in float32, so that
// nothing is decided by rounded keys. A block's keys stop together, when all have found their copies.

#include "rkv-score.cuh"
#include "rkv-dequant.cuh"

#include "cp-async.cuh"
#include "mma.cuh"

// two factors rounded by 2^-11 each, of vectors not longer than 1, and float32 sums
static constexpr float ROUNDING = 1.1e-3f;

using tile_d = ggml_cuda_mma::tile<16, 8, float>;
using tile_x = ggml_cuda_mma::tile<16, 8, half2>; // keys that search
using tile_y = ggml_cuda_mma::tile<8, 8, half2>;  // keys that are looked through

template <int type>
static __device__ __forceinline__ float cosine_as(int type_k, int n_embd, const char * ki, const char * kj, float ui, float uj) {
    float sum = 0.0f;
#pragma unroll 2
    for (int e = 2*threadIdx.x; e < n_embd; e += 2*WARP_SIZE) {
        const float2 x = rkv_load2<type>(type_k, ki, e), y = rkv_load2<type>(type_k, kj, e);
        sum += (x.x*ui)*(y.x*uj) + (x.y*ui)*(y.y*uj);
    }
    return warp_reduce_sum(sum);
}

// cosine of two keys, by a warp
static __device__ __noinline__ float exact_cosine(int type_k, int n_embd, const char * ki, const char * kj, float ui, float uj) {
    switch (type_k) {
        case GGML_TYPE_F32:  return cosine_as<GGML_TYPE_F32>  (type_k, n_embd, ki, kj, ui, uj);
        case GGML_TYPE_F16:  return cosine_as<GGML_TYPE_F16>  (type_k, n_embd, ki, kj, ui, uj);
        case GGML_TYPE_Q8_0: return cosine_as<GGML_TYPE_Q8_0> (type_k, n_embd, ki, kj, ui, uj);
        default:             return cosine_as<GGML_TYPE_COUNT>(type_k, n_embd, ki, kj, ui, uj);
    }
}

// what a warp knows of its 32 keys; a lane speaks for key i
struct searchers {
    const rkv_cuda_score_args & a;
    const char * keys;
    const float * inv;
    unsigned long long * spared;
    int  n, i;
    bool found;

    __device__ searchers(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, const int32_t * job, int head, int64_t at, int i) :
        a(a), keys(rkv_key(a, job, head, 0)), inv(s.inv + at), spared(s.spared + at), n(rkv_n_cells(job)), i(i), found(i >= n) {}

    __device__ float cosine(int i, int j) const { // the diagonal is 0
        return i == j ? 0.0f : exact_cosine(a.type_k, a.n_embd, keys + i*a.k_cell, keys + j*a.k_cell, inv[i], inv[j]);
    }

    __device__ void spare(int j, float c) const {
        if (threadIdx.x == 0) {
            atomicAdd(spared + j, (unsigned long long) (long long) (c*RKV_SPARED_UNIT));
        }
    }

    // candidates: a bit for each key of the tile from key `first` on that may be this lane's key's copy
    __device__ void resolve(uint2 candidates, int first) {
        const int lane = threadIdx.x, i0 = i - lane, own = i - first;
        if (a.par.threshold >= 0.0f && own >= 0 && own < RKV_CUDA_TILE) { // itself: not worth a look
            (own < 32 ? candidates.x : candidates.y) &= ~(1u << own%32);
        }
        const bool open = !found && (candidates.x | candidates.y) != 0;
        if (!__any_sync(0xffffffff, open)) {
            return;
        }
        for (int r = 0; r < WARP_SIZE; ++r) {
            if (!__shfl_sync(0xffffffff, (int) open, r, WARP_SIZE)) {
                continue;
            }
            const uint32_t lo = __shfl_sync(0xffffffff, candidates.x, r, WARP_SIZE), hi = __shfl_sync(0xffffffff, candidates.y, r, WARP_SIZE);
            bool done = false;
            for (int h = 1; h >= 0 && !done; --h) {
                for (uint32_t mask = h == 1 ? hi : lo; mask != 0 && !done;) {
                    const int bit = 31 - __clz(mask), j = first + 32*h + bit;
                    mask ^= 1u << bit;
                    if (j >= n) {
                        continue;
                    }
                    const float c = cosine(i0 + r, j);
                    if (c > a.par.threshold) {
                        done = true;
                        spare(j, c);
                    }
                }
            }
            found = found || (done && lane == r);
        }
    }

    __device__ void none_found() const {
        if (!(a.par.flags & RKV_FLAG_REFERENCE)) {
            return;
        }
        for (int r = 0; r < WARP_SIZE; ++r) {
            if (!__shfl_sync(0xffffffff, (int) found, r, WARP_SIZE)) {
                spare(0, cosine(i - (int) threadIdx.x + r, 0)); // the authors' code zeroes column 0
            }
        }
    }
};

// the 32 x 64 products of a warp: bits of the large ones; `bits` is this warp's, [32][2]
static __device__ __forceinline__ bool collect(const tile_d (&acc)[2][8], float close, uint32_t * bits) {
#ifdef TURING_MMA_AVAILABLE
    float top[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
        for (int l = 0; l < tile_d::ne; ++l) {
            top[l] = fmaxf(top[l], fmaxf(acc[0][c].x[l], acc[1][c].x[l]));
        }
    }
    static_assert(tile_d::ne == 4, "bad tile size");
    if (!__any_sync(0xffffffff, fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])) > close)) {
        return false;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
#pragma unroll
            for (int l = 0; l < tile_d::ne; ++l) {
                if (acc[r][c].x[l] > close) {
                    const int col = 8*c + tile_d::get_j(l);
                    atomicOr(bits + 2*(16*r + tile_d::get_i(l)) + col/32, 1u << col%32);
                }
            }
        }
    }
    ggml_cuda_syncwarp();
    return true;
#else
    GGML_UNUSED_VARS(acc, close, bits);
    return false;
#endif
}

#ifdef TURING_MMA_AVAILABLE
// where a lane's part of a pair of tiles begins, as load_pair wants it; stride in halves
static __device__ __forceinline__ uint32_t pair_address(const half * tile, int stride) {
    const int lane = threadIdx.x;
    return (uint32_t) __cvta_generic_to_shared(tile + (lane%8 + lane/16*8)*stride + lane/8%2*8);
}

// 16 keys by 16 elements. ggml_cuda_mma's own takes 64-bit addresses, one more addition for each load.
static __device__ __forceinline__ void load_pair(tile_y (&y)[2], uint32_t address) {
    int * y0 = (int *) y[0].x;
    int * y1 = (int *) y[1].x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(y0[0]), "=r"(y0[1]), "=r"(y1[0]), "=r"(y1[1]) : "r"(address));
}
#endif // TURING_MMA_AVAILABLE

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

//
// heads of up to 128 elements: a block's own keys stay in registers
//

static constexpr int FAST_WARPS = 4, FAST_ROWS = 32*FAST_WARPS, FAST_THREADS = WARP_SIZE*FAST_WARPS;

template <int D>
static __global__ void __launch_bounds__(FAST_THREADS, 3) rkv_search_fast(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
#ifdef TURING_MMA_AVAILABLE
    const int head = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const int tid  = warp*WARP_SIZE + lane, row0 = blockIdx.x*FAST_ROWS;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int n = rkv_n_cells(job);
    if (row0 >= n || n <= a.par.window) {
        return;
    }
    constexpr int stride = D + 8; // halves; odd multiples of 16 bytes have no bank conflicts
    static_assert(FAST_ROWS == 2*RKV_CUDA_TILE, "the block's keys pass through the tiles' memory");
    __shared__ __align__(16) half tiles[2][RKV_CUDA_TILE*stride];
    __shared__ __align__(8) uint32_t bits[2*FAST_ROWS]; // a bit per key of the tile

    const int64_t at   = (int64_t) (blockIdx.z*a.n_head_kv + head)*s.n_pad;
    const half  * unit = s.unit_h + at*D;
    const int n_tile   = (n + RKV_CUDA_TILE - 1)/RKV_CUDA_TILE;

    // cells past the last tile are not in the scratch memory
    for (int it = tid; it < FAST_ROWS*D/8; it += FAST_THREADS) {
        const int r = it/(D/8), e = 8*(it%(D/8));
        half * dst = tiles[0] + r*stride + e;
        if (row0 + r < n_tile*RKV_CUDA_TILE) {
            copy_16(dst, unit + (int64_t) (row0 + r)*D + e);
        } else {
            *(int4 *) dst = make_int4(0, 0, 0, 0);
        }
    }
    bits[tid] = bits[tid + FAST_ROWS] = 0;
    copies_done();
    __syncthreads();
    tile_x x[2][D/16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int e = 0; e < D/16; ++e) {
            ggml_cuda_mma::load_ldmatrix(x[r][e], (const half2 *) (tiles[0] + (32*warp + 16*r)*stride + 16*e), stride/2);
        }
    }
    __syncthreads();

    const auto fetch = [&](int tile) {
        const int r = tid/8, e = 8*(tid%8); // 8 threads per key: addresses differ by constants from here on
        const half * src = unit + (int64_t) tile*RKV_CUDA_TILE*D + r*D + e;
        half * dst = tiles[tile%2] + r*stride + e;
#pragma unroll
        for (int i = 0; i < RKV_CUDA_TILE; i += FAST_THREADS/8) {
#pragma unroll
            for (int j = 0; j < D; j += 64) {
                if (j + 64 <= D || e + j < D) {
                    copy_16(dst + i*stride + j, src + i*D + j);
                }
            }
        }
    };
    fetch(n_tile - 1);

    searchers search(a, s, job, head, at, row0 + tid);
    const float close = a.par.threshold - ROUNDING;
    for (int t = n_tile - 1; t >= 0; --t) {
        copies_done();
        if (__syncthreads_and(search.found)) {
            break;
        }
        if (t > 0) {
            fetch(t - 1);
        }
        if (!__any_sync(0xffffffff, !search.found)) {
            continue;
        }
        const half * tile = tiles[t%2];
        tile_d acc[2][8];
        const uint32_t address = pair_address(tile, stride);
#pragma unroll
        for (int e = 0; e < D/16; ++e) {
#pragma unroll
            for (int c = 0; c < 8; c += 2) {
                tile_y y[2];
                load_pair(y, address + sizeof(half)*(8*c*stride + 16*e));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    ggml_cuda_mma::mma(acc[r][c],     x[r][e], y[0]);
                    ggml_cuda_mma::mma(acc[r][c + 1], x[r][e], y[1]);
                }
            }
        }
        if (collect(acc, close, bits + 64*warp)) {
            uint2 * mine = (uint2 *) (bits + 2*tid);
            search.resolve(*mine, t*RKV_CUDA_TILE);
            *mine = make_uint2(0, 0);
            ggml_cuda_syncwarp();
        }
    }
    copies_done(); // a block ends with no copy under way
    search.none_found();
#else
    GGML_UNUSED_VARS(a, s);
    NO_DEVICE_CODE;
#endif
}

//
// any other head, and devices without matrix instructions
//

static constexpr int SEARCH_K = 64;           // elements of a tile that are in shared memory at a time
static constexpr int STRIDE_B = SEARCH_K + 8;

static size_t shared_bytes(int n_warp, int d_pad) {
    return sizeof(half)*((size_t) 32*n_warp*(d_pad + 8) + 2*RKV_CUDA_TILE*STRIDE_B) + sizeof(uint32_t)*64*n_warp;
}

template <int n_warp>
static __global__ void __launch_bounds__(n_warp*WARP_SIZE) rkv_search(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    constexpr int n_row = 32*n_warp, n_thread = WARP_SIZE*n_warp;
    const int head = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const int tid  = warp*WARP_SIZE + lane, row0 = blockIdx.x*n_row;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int n = rkv_n_cells(job);
    if (row0 >= n || n <= a.par.window) {
        return;
    }
    const int n_tile   = (n + RKV_CUDA_TILE - 1)/RKV_CUDA_TILE;
    const int n_chunk  = (s.d_pad + SEARCH_K - 1)/SEARCH_K;
    const int stride_a = s.d_pad + 8;

    extern __shared__ __align__(16) char shared[];
    half     * rows = (half *) shared;                                // [n_row][stride_a]
    half     * cols = rows + n_row*stride_a;                          // two of [RKV_CUDA_TILE][STRIDE_B]
    uint32_t * bits = (uint32_t *) (cols + 2*RKV_CUDA_TILE*STRIDE_B); // [n_row][2]

    const int64_t at   = (int64_t) (blockIdx.z*a.n_head_kv + head)*s.n_pad;
    const half  * unit = s.unit_h + at*s.d_pad;

    // cells past the last tile are not in the scratch memory
    for (int it = tid; it < n_row*s.d_pad/8; it += n_thread) {
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
        for (int it = tid; it < RKV_CUDA_TILE*SEARCH_K/8; it += n_thread) {
            const int c = it/(SEARCH_K/8), e = it%(SEARCH_K/8);
            if (e < width) {
                copy_16(dst + c*STRIDE_B + 8*e, unit + (int64_t) (tile*RKV_CUDA_TILE + c)*s.d_pad + e0 + 8*e);
            }
        }
    };
    fetch(0);
    bits[tid] = bits[tid + n_row] = 0;

    searchers search(a, s, job, head, at, row0 + tid);
    const float close = a.par.threshold - ROUNDING;
#ifdef TURING_MMA_AVAILABLE
    tile_d acc[2][8];
#else
    float acc[32][2];
#endif
    for (int step = 0; step < n_tile*n_chunk; ++step) {
        copies_done();
        if (__syncthreads_and(search.found)) {
            break;
        }
        if (step + 1 < n_tile*n_chunk) {
            fetch(step + 1);
        }
        if (!__any_sync(0xffffffff, !search.found)) {
            continue;
        }
        const int chunk = step%n_chunk, e0 = chunk*SEARCH_K, width = min(SEARCH_K, s.d_pad - e0);
        const half * tile  = cols + step%2*RKV_CUDA_TILE*STRIDE_B;
        uint32_t   * mine  = bits + 2*tid;
        bool any = false;
#ifdef TURING_MMA_AVAILABLE
        if (chunk == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    acc[r][c] = tile_d();
                }
            }
        }
        for (int e = 0; e < width; e += 16) {
            tile_x x[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                ggml_cuda_mma::load_ldmatrix(x[r], (const half2 *) (rows + (32*warp + 16*r)*stride_a + e0 + e), stride_a/2);
            }
#pragma unroll
            for (int c = 0; c < 8; c += 2) {
                tile_y y[2];
                load_pair(y, pair_address(tile, STRIDE_B) + sizeof(half)*(8*c*STRIDE_B + e));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    ggml_cuda_mma::mma(acc[r][c],     x[r], y[0]);
                    ggml_cuda_mma::mma(acc[r][c + 1], x[r], y[1]);
                }
            }
        }
        if (chunk + 1 == n_chunk) {
            any = collect(acc, close, bits + 64*warp);
        }
#else
#pragma unroll
        for (int r = 0; r < 32; ++r) {
            acc[r][0] = chunk == 0 ? 0.0f : acc[r][0];
            acc[r][1] = chunk == 0 ? 0.0f : acc[r][1];
        }
        for (int e = 0; e < width; e += 2) {
            const float2 y0 = __half22float2(*(const half2 *) (tile + lane*STRIDE_B + e));
            const float2 y1 = __half22float2(*(const half2 *) (tile + (lane + 32)*STRIDE_B + e));
#pragma unroll
            for (int r = 0; r < 32; ++r) {
                const float2 x = __half22float2(*(const half2 *) (rows + (32*warp + r)*stride_a + e0 + e));
                acc[r][0] += x.x*y0.x + x.y*y0.y;
                acc[r][1] += x.x*y1.x + x.y*y1.y;
            }
        }
        if (chunk + 1 == n_chunk) {
#pragma unroll
            for (int r = 0; r < 32; ++r) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    if (acc[r][c] > close) {
                        atomicOr(bits + 2*(32*warp + r) + c, 1u << lane);
                        any = true;
                    }
                }
            }
            any = __any_sync(0xffffffff, any);
            ggml_cuda_syncwarp();
        }
#endif
        if (any) {
            search.resolve(make_uint2(mine[0], mine[1]), (n_tile - 1 - step/n_chunk)*RKV_CUDA_TILE);
            mine[0] = mine[1] = 0;
            ggml_cuda_syncwarp();
        }
    }
    copies_done();
    search.none_found();
}

template <int D>
static void launch_fast(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    const dim3 grid((a.n_cells + FAST_ROWS - 1)/FAST_ROWS, a.n_head_kv, n_jobs), block(WARP_SIZE, FAST_WARPS);
    rkv_search_fast<D><<<grid, block, 0, stream>>>(a, s);
}

template <int n_warp>
static void launch(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, size_t smpbo, cudaStream_t stream) {
    const dim3 grid((a.n_cells + 32*n_warp - 1)/(32*n_warp), a.n_head_kv, n_jobs), block(WARP_SIZE, n_warp);
    CUDA_SET_SHARED_MEMORY_LIMIT(rkv_search<n_warp>, smpbo);
    rkv_search<n_warp><<<grid, block, shared_bytes(n_warp, s.d_pad), stream>>>(a, s);
}

bool rkv_cuda_search_supported(int n_embd, rkv_cuda_device device) {
    return shared_bytes(1, (n_embd + 15)/16*16) <= device.smpbo;
}

void rkv_cuda_search(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, rkv_cuda_device device, cudaStream_t stream) {
    switch (device.mma ? s.d_pad : 0) {
        case 64:  launch_fast<64> (a, s, n_jobs, stream); return;
        case 80:  launch_fast<80> (a, s, n_jobs, stream); return;
        case 96:  launch_fast<96> (a, s, n_jobs, stream); return;
        case 112: launch_fast<112>(a, s, n_jobs, stream); return;
        case 128: launch_fast<128>(a, s, n_jobs, stream); return;
    }
    if (shared_bytes(4, s.d_pad) <= device.smpbo) {
        launch<4>(a, s, n_jobs, device.smpbo, stream);
    } else if (shared_bytes(2, s.d_pad) <= device.smpbo) {
        launch<2>(a, s, n_jobs, device.smpbo, stream);
    } else {
        launch<1>(a, s, n_jobs, device.smpbo, stream);
    }
}
