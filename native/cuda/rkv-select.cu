// Rows to keep: the pinned ones, the highest scores among the rest, the window; ascending. A block per head finds the
// score of the last row that is in by radix, and gathers in a second go.

#include "rkv-kernels.cuh"

static constexpr int SELECT_WARPS = 16, SELECT_THREADS = SELECT_WARPS*WARP_SIZE;

// a larger score is a larger key; NaN counts as the smallest, -0 as 0
static __device__ __forceinline__ uint32_t key_of(float z) {
    const uint32_t x = __float_as_uint(z);
    if ((x & 0x7fffffffu) > 0x7f800000u) {
        return ~0xff800000u;
    }
    if ((x & 0x7fffffffu) == 0) {
        return 0x80000000u;
    }
    return x & 0x80000000u ? ~x : x | 0x80000000u;
}

static __global__ void __launch_bounds__(SELECT_THREADS) rkv_select(const rkv_cuda_select_args a) {
    const int head = blockIdx.x, tid = threadIdx.x, lane = tid%WARP_SIZE, warp = tid/WARP_SIZE;
    const int32_t * job = a.jobs[blockIdx.y];
    const int begin = job[RKV_JOB_BEGIN], n = job[RKV_JOB_END] - begin, keep = job[RKV_JOB_KEEP];
    const int pin = job[RKV_JOB_PIN];
    int32_t * out = a.dst + head*a.dst_head + blockIdx.y*a.dst_job;
    if (keep >= n) {
        for (int j = tid; j < n; j += SELECT_THREADS) {
            out[j] = begin + j;
        }
        return;
    }
    const float * z = a.score + head*a.score_head + blockIdx.y*a.score_job + pin;
    const int n_cand = n - a.window - pin;
    const int n_top  = keep - a.window - pin;

    __shared__ uint32_t count[256];
    __shared__ uint32_t found[2]; // digit, rows still to be found below it
    __shared__ uint32_t warp_total[SELECT_WARPS];

    uint32_t last = 0, need = n_top; // key of the last row that is in; how many rows with that key are
    for (int shift = 24; shift >= 0 && n_top > 0; shift -= 8) {
        for (int i = tid; i < 256; i += SELECT_THREADS) {
            count[i] = 0;
        }
        __syncthreads();
        for (int j = tid; j < n_cand; j += SELECT_THREADS) {
            const uint32_t key = key_of(z[j]);
            if (shift == 24 || key >> (shift + 8) == last >> (shift + 8)) {
                atomicAdd(count + (key >> shift & 255), 1u);
            }
        }
        __syncthreads();
        if (warp == 0) { // a lane owns 8 digits, the highest first
            uint32_t own = 0;
            for (int i = 0; i < 8; ++i) {
                own += count[255 - 8*lane - i];
            }
            uint32_t above = own;
            for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
                const uint32_t other = __shfl_up_sync(0xffffffff, above, offset, WARP_SIZE);
                above += lane >= offset ? other : 0;
            }
            above -= own;
            if (above < need && above + own >= need) {
                int digit = 255 - 8*lane;
                while (above + count[digit] < need) {
                    above += count[digit--];
                }
                found[0] = digit;
                found[1] = need - above;
            }
        }
        __syncthreads();
        last |= found[0] << shift;
        need  = found[1];
        __syncthreads();
    }

    for (int j = tid; j < pin; j += SELECT_THREADS) {
        out[j] = begin + j;
    }
    for (int j = tid; j < a.window; j += SELECT_THREADS) {
        out[keep - a.window + j] = begin + n - a.window + j;
    }

    // counts of both kinds in one word: a round has no more than 512 rows
    uint32_t n_above = 0, n_equal = 0;
    for (int j0 = 0; j0 < n_cand && n_top > 0; j0 += SELECT_THREADS) {
        const int j = j0 + tid;
        uint32_t mine = 0;
        if (j < n_cand) {
            const uint32_t key = key_of(z[j]);
            mine = key > last ? 1 : key == last ? 1 << 16 : 0;
        }
        uint32_t before = mine;
        for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffff, before, offset, WARP_SIZE);
            before += lane >= offset ? other : 0;
        }
        __syncthreads(); // the last round's totals have been read
        if (lane == WARP_SIZE - 1) {
            warp_total[warp] = before;
        }
        __syncthreads();
        before -= mine;
        uint32_t all = 0;
        for (int w = 0; w < SELECT_WARPS; ++w) {
            before += w < warp ? warp_total[w] : 0;
            all    += warp_total[w];
        }
        const uint32_t above = n_above + (before & 0xffff), equal = n_equal + (before >> 16);
        if (mine == 1 || (mine != 0 && equal < need)) {
            out[pin + above + min(equal, need)] = begin + pin + j;
        }
        n_above += all & 0xffff;
        n_equal += all >> 16;
    }
}

void rkv_cuda_select(const rkv_cuda_select_args & a, cudaStream_t stream) {
    rkv_select<<<dim3(a.n_head, a.jobs.n), SELECT_THREADS, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
