// Gathers kept units in place, as bytes. Rows only move towards the front: a block reads some of a line's rows, waits,
// and writes them; what it writes lies before whatever is still to be read.

#include "rkv-kernels.cuh"

#include <numeric>

static constexpr int COMPACT_THREADS = 256, COMPACT_ITEMS = 8; // per thread and round

template <typename word>
static __global__ void __launch_bounds__(COMPACT_THREADS, 4) rkv_compact(const rkv_cuda_compact_args a, int n_word, int slice_log2, int n_slice) {
    const int line = blockIdx.x/n_slice, slice = blockIdx.x%n_slice;
    const int32_t * job = a.jobs[blockIdx.y];
    const int32_t * idx = a.idx + (int64_t) (line/(a.n_line/a.n_head))*a.idx_head + blockIdx.y*a.idx_job;
    char * base = a.data + job[RKV_JOB_STREAM]*a.stream + line*a.line;
    const int n   = min(job[RKV_JOB_KEEP], job[RKV_JOB_END] - job[RKV_JOB_BEGIN]);
    const int dst = job[RKV_JOB_DST];

    const int n_round = (COMPACT_THREADS*COMPACT_ITEMS) >> slice_log2; // rows
    const int w = (slice << slice_log2) + (threadIdx.x & ((1 << slice_log2) - 1));
    for (int r0 = 0; r0 < n; r0 += n_round) {
        word x[COMPACT_ITEMS];
        bool moves[COMPACT_ITEMS];
#pragma unroll
        for (int i = 0; i < COMPACT_ITEMS; ++i) {
            const int r   = r0 + ((threadIdx.x + i*COMPACT_THREADS) >> slice_log2);
            const int row = r < n && w < n_word ? idx[r] : dst + r;
            moves[i] = row != dst + r;
            if (moves[i]) {
                x[i] = ((const word *) (base + row*a.cell))[w];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < COMPACT_ITEMS; ++i) {
            const int r = r0 + ((threadIdx.x + i*COMPACT_THREADS) >> slice_log2);
            if (moves[i]) {
                ((word *) (base + (int64_t) (dst + r)*a.cell))[w] = x[i];
            }
        }
    }
}

template <typename word>
static void launch(const rkv_cuda_compact_args & a, int n_sm, cudaStream_t stream) {
    const int n_word = a.unit/sizeof(word);
    // a block moves up to 4 words of each row; fewer where that leaves blocks for the whole device
    const int most = (int64_t) a.n_line*a.jobs.n*((n_word + 3)/4) < n_sm ? 1 : 2;
    int slice_log2 = 0;
    while (slice_log2 < most && (1 << slice_log2) < n_word) {
        ++slice_log2;
    }
    const int n_slice = (n_word + (1 << slice_log2) - 1) >> slice_log2;
    rkv_compact<word><<<dim3(a.n_line*n_slice, a.jobs.n), COMPACT_THREADS, 0, stream>>>(a, n_word, slice_log2, n_slice);
}

void rkv_cuda_compact(const rkv_cuda_compact_args & a, int n_sm, cudaStream_t stream) {
    // the widest word that every address is a multiple of
    int64_t align = std::gcd((int64_t) (uintptr_t) a.data, (int64_t) 16);
    for (const int64_t x : { a.cell, a.line, a.stream, a.unit }) {
        align = std::gcd(align, x);
    }
    switch (align) {
        case 16: launch<int4>   (a, n_sm, stream); break;
        case 8:  launch<int2>   (a, n_sm, stream); break;
        case 4:  launch<int>    (a, n_sm, stream); break;
        case 2:  launch<int16_t>(a, n_sm, stream); break;
        default: launch<int8_t> (a, n_sm, stream); break;
    }
    CUDA_CHECK(cudaGetLastError());
}

static __global__ void rkv_positions(const rkv_cuda_positions_args a) {
    const int32_t * job = a.jobs[blockIdx.y];
    const int32_t * src = a.src + blockIdx.y*a.src_job + job[RKV_JOB_SHIFT];
    int32_t * dst = a.dst + job[RKV_JOB_STREAM]*a.dst_stream + blockIdx.x*a.dst_head;
    for (int j = job[RKV_JOB_OLD_END] + threadIdx.x; j < job[RKV_JOB_END]; j += blockDim.x) {
        dst[j] = src[j];
    }
}

void rkv_cuda_positions(const rkv_cuda_positions_args & a, cudaStream_t stream) {
    rkv_positions<<<dim3(a.n_head, a.jobs.n), 128, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
