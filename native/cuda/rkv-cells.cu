// What policies ask of single cells: the lengths of values, how keys and values deviate from those of the next chunk, and
// what the mean query will look at. A warp per cell.

#include "rkv-score.cuh"
#include "rkv-dequant.cuh"
#include "rkv-rotate.cuh"

static constexpr int CELL_WARPS = 8, REDUCE_WARPS = 16;

// rows of keys or of values
struct cell_rows {
    const char * data;
    int64_t el, cell, head, stream; // bytes; el: 0 = elements are adjacent
    int type, n_embd, n_hadamard;

    __device__ const char * row(const int32_t * job, int h, int j) const {
        return data + job[RKV_JOB_STREAM]*stream + h*head + (int64_t) (job[RKV_JOB_BEGIN] + j)*cell;
    }
};

static cell_rows keys_of(const rkv_cuda_score_args & a) {
    return { a.k, 0, a.k_cell, a.k_head, a.k_stream, a.type_k, a.n_embd, a.par.n_hadamard };
}

static cell_rows values_of(const rkv_cuda_score_args & a) {
    const int64_t el = a.v_el == (int64_t) ggml_type_size((ggml_type) a.type_v) ? 0 : a.v_el;
    return { a.v, el, a.v_cell, a.v_head, a.v_stream, a.type_v, a.n_embd_v, a.par.n_hadamard_v };
}

// without the cache's Hadamard rotation; 0 beyond the row's end
template <int type, int NP>
static __device__ __forceinline__ void load_row(float2 (&x)[NP], const cell_rows & rows, const char * row) {
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        const int e = 2*threadIdx.x + 64*p;
        if (e >= rows.n_embd) {
            x[p] = make_float2(0.0f, 0.0f);
        } else if (rows.el == 0) {
            x[p] = rkv_load2<type>(rows.type, row, e);
        } else {
            x[p] = make_float2(rkv_load1<type>(row + e*rows.el), rkv_load1<type>(row + (e + 1)*rows.el));
        }
    }
    if (rows.n_hadamard > 0) {
        rkv_undo_hadamard(x, rows.n_hadamard);
    }
}

// f(type, NP) as constants
template <typename F>
static void with_row(int type, int n_embd, F && f) {
    rkv_with_type(type, [&](auto t) {
        switch ((n_embd + 63)/64) {
            case 1:  f(t, std::integral_constant<int, 1>()); break;
            case 2:  f(t, std::integral_constant<int, 2>()); break;
            case 3:
            case 4:  f(t, std::integral_constant<int, 4>()); break;
            default: f(t, std::integral_constant<int, 9>()); break;
        }
    });
}

//
// lengths of values
//

template <int type, int NP>
static __global__ void __launch_bounds__(CELL_WARPS*WARP_SIZE) rkv_lengths(const rkv_cuda_score_args a, const rkv_cuda_scratch s, const cell_rows rows) {
    const int tile = blockIdx.x, head = blockIdx.y;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int last = min((tile + 1)*RKV_CUDA_TILE, rkv_n_cells(job));
    for (int j = tile*RKV_CUDA_TILE + threadIdx.y; j < last; j += CELL_WARPS) {
        float2 x[NP];
        load_row<type>(x, rows, rows.row(job, head, j));
        float sq = 0.0f;
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            sq += x[p].x*x[p].x + x[p].y*x[p].y;
        }
        sq = warp_reduce_sum(sq);
        if (threadIdx.x == 0) {
            s.m[(int64_t) (blockIdx.z*a.n_head_kv + head)*s.n_pad + j] = sqrtf(sq);
        }
    }
}

void rkv_cuda_lengths(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    const dim3 grid(s.n_tile, a.n_head_kv, n_jobs), block(WARP_SIZE, CELL_WARPS);
    with_row(a.type_v, a.n_embd_v, [&](auto type, auto np) {
        rkv_lengths<decltype(type)::value, decltype(np)::value><<<grid, block, 0, stream>>>(a, s, values_of(a));
    });
}

//
// latest: how far values are from their mean, added to the score of the keys in dst; a block per head
//

// mean and 1/deviation of x[0..n)
static __device__ float2 spread(const float * x, int n, float * shared) {
    const int tid = threadIdx.y*WARP_SIZE + threadIdx.x;
    const auto plus = [](float a, float b) { return a + b; };
    float total = 0.0f;
    for (int j = tid; j < n; j += REDUCE_WARPS*WARP_SIZE) {
        total += x[j];
    }
    const float mean = rkv_block_reduce<REDUCE_WARPS>(total, shared, plus)/n;
    float sq = 0.0f;
    for (int j = tid; j < n; j += REDUCE_WARPS*WARP_SIZE) {
        sq += (x[j] - mean)*(x[j] - mean);
    }
    sq = rkv_block_reduce<REDUCE_WARPS>(sq, shared, plus)/n;
    return make_float2(mean, rsqrtf(sq + RKV_LEAST_VARIANCE));
}

template <int type, int NP>
static __global__ void __launch_bounds__(REDUCE_WARPS*WARP_SIZE) rkv_add_values(const rkv_cuda_score_args a, const rkv_cuda_scratch s, const cell_rows rows) {
    const int head = blockIdx.x, lane = threadIdx.x, warp = threadIdx.y, tid = warp*WARP_SIZE + lane;
    const int32_t * job = a.jobs[s.job0 + blockIdx.y];
    const int n = rkv_n_cells(job), n_cand = n - a.par.window;
    if (n_cand <= 0) {
        return;
    }
    __shared__ float shared[REDUCE_WARPS], mean[64*NP];
    for (int e = tid; e < 64*NP; e += REDUCE_WARPS*WARP_SIZE) {
        mean[e] = 0.0f;
    }
    float2 x[NP], total[NP] = {};
    for (int j = warp; j < n; j += REDUCE_WARPS) {
        load_row<type>(x, rows, rows.row(job, head, j));
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            total[p].x += x[p].x;
            total[p].y += x[p].y;
        }
    }
    for (int w = 0; w < REDUCE_WARPS; ++w) { // in a fixed order: the same result each time
        __syncthreads();
        if (w == warp) {
#pragma unroll
            for (int p = 0; p < NP; ++p) {
                mean[2*lane + 64*p]     += total[p].x;
                mean[2*lane + 64*p + 1] += total[p].y;
            }
        }
    }
    __syncthreads();
    for (int e = tid; e < 64*NP; e += REDUCE_WARPS*WARP_SIZE) {
        mean[e] /= n;
    }
    __syncthreads();
    float * z   = a.dst  + (s.job0 + blockIdx.y)*a.dst_job + head*a.dst_head;
    float * far = s.mean + (int64_t) (blockIdx.y*a.n_head_kv + head)*s.n_pad;
    for (int j = warp; j < n_cand; j += REDUCE_WARPS) {
        load_row<type>(x, rows, rows.row(job, head, j));
        float sq = 0.0f;
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const float dx = x[p].x - mean[2*lane + 64*p], dy = x[p].y - mean[2*lane + 64*p + 1];
            sq += dx*dx + dy*dy; // 0 beyond the row's end
        }
        sq = warp_reduce_sum(sq);
        if (lane == 0) {
            far[j] = sqrtf(sq);
        }
    }
    __syncthreads();
    const float2 of_keys = spread(z, n_cand, shared), of_values = spread(far, n_cand, shared);
    const auto logistic = [](float x, float2 of) {
        const float t = RKV_LOGISTIC_SCALE*(x - of.x)*of.y, e = rkv_exp(-fabsf(t));
        return (t < 0.0f ? e : 1.0f)/(1.0f + e);
    };
    for (int j = tid; j < n_cand; j += REDUCE_WARPS*WARP_SIZE) {
        z[j] = logistic(z[j], of_keys) + a.par.value_weight*logistic(far[j], of_values);
    }
}

void rkv_cuda_add_values(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    const dim3 grid(a.n_head_kv, n_jobs), block(WARP_SIZE, REDUCE_WARPS);
    cell_rows rows  = values_of(a);
    rows.n_hadamard = 0; // a rotation keeps distances
    with_row(rows.type, rows.n_embd, [&](auto type, auto np) {
        rkv_add_values<decltype(type)::value, decltype(np)::value><<<grid, block, 0, stream>>>(a, s, rows);
    });
}

//
// lagkv: channels are normalised by their range in the next chunk; a block per chunk
//

template <int type, int NP>
static __global__ void __launch_bounds__(CELL_WARPS*WARP_SIZE) rkv_lag(const rkv_cuda_score_args a, const rkv_cuda_scratch s, const cell_rows rows,
        float * deviation) {
    const int head = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y, d = rows.n_embd;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int n = rkv_n_cells(job), pin = job[RKV_JOB_PIN];
    if (n <= a.par.window) {
        return;
    }
    extern __shared__ float shared[]; // [CELL_WARPS][2][d]
    const int n_chunk = rkv_lag_chunk(a, job);
    const int n_lag   = (n - pin)/n_chunk - 1; // chunks that a whole one follows
    float * out = deviation + (int64_t) (blockIdx.z*a.n_head_kv + head)*s.n_pad;
    for (int lag = blockIdx.x; lag < n_lag; lag += gridDim.x) {
        const int first = pin + lag*n_chunk;
        float2 x[NP], least[NP], most[NP];
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            least[p] = make_float2(INFINITY, INFINITY);
            most [p] = make_float2(-INFINITY, -INFINITY);
        }
        for (int j = first + n_chunk + warp; j < first + 2*n_chunk; j += CELL_WARPS) {
            load_row<type>(x, rows, rows.row(job, head, j));
#pragma unroll
            for (int p = 0; p < NP; ++p) {
                least[p] = make_float2(fminf(least[p].x, x[p].x), fminf(least[p].y, x[p].y));
                most [p] = make_float2(fmaxf(most [p].x, x[p].x), fmaxf(most [p].y, x[p].y));
            }
        }
        __syncthreads(); // the last chunk's have been read
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            if (e < d) {
                float * low = shared + 2*warp*d + e, * high = low + d;
                low [0] = least[p].x;
                low [1] = least[p].y;
                high[0] = most [p].x;
                high[1] = most [p].y;
            }
        }
        __syncthreads();
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            for (int w = 0; w < CELL_WARPS && e < d; ++w) {
                const float * low = shared + 2*w*d + e, * high = low + d;
                least[p] = make_float2(fminf(least[p].x, low [0]), fminf(least[p].y, low [1]));
                most [p] = make_float2(fmaxf(most [p].x, high[0]), fmaxf(most [p].y, high[1]));
            }
        }
        for (int j = first + warp; j < first + n_chunk; j += CELL_WARPS) {
            load_row<type>(x, rows, rows.row(job, head, j));
            float total = 0.0f, sq = 0.0f;
#pragma unroll
            for (int p = 0; p < NP; ++p) {
                const float2 range = make_float2(most[p].x - least[p].x, most[p].y - least[p].y); // -inf beyond the row's end
                x[p].x = range.x > 0.0f ? (x[p].x - least[p].x)/range.x : 0.0f;
                x[p].y = range.y > 0.0f ? (x[p].y - least[p].y)/range.y : 0.0f;
                if (2*lane + 64*p < d) {
                    total += x[p].x + x[p].y;
                }
            }
            const float mean = warp_reduce_sum(total)/d;
#pragma unroll
            for (int p = 0; p < NP; ++p) {
                if (2*lane + 64*p < d) {
                    sq += (x[p].x - mean)*(x[p].x - mean) + (x[p].y - mean)*(x[p].y - mean);
                }
            }
            sq = warp_reduce_sum(sq);
            if (lane == 0) {
                out[j] = sqrtf(sq/max(1, d - 1));
            }
        }
    }
}

void rkv_cuda_lag(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    const int n_chunk = std::max(1, (int) a.par.chunk);
    const dim3 grid(std::clamp(a.n_cells/n_chunk, 4, 256), a.n_head_kv, n_jobs), block(WARP_SIZE, CELL_WARPS);
    for (const bool of_values : { false, true }) {
        const cell_rows rows = of_values ? values_of(a) : keys_of(a);
        with_row(rows.type, rows.n_embd, [&](auto type, auto np) {
            rkv_lag<decltype(type)::value, decltype(np)::value><<<grid, block, sizeof(float)*2*CELL_WARPS*rows.n_embd, stream>>>(
                a, s, rows, of_values ? s.mean : s.m);
        });
    }
}

//
// triattention: see native/cpu/rkv-scorer.cpp
//

// the window's queries of one head go into its statistics, one after the other; a warp per query head
template <int NP>
static __global__ void __launch_bounds__(WARP_SIZE) rkv_statistics(const rkv_cuda_score_args a, const rkv_cuda_scratch s) {
    const int head = blockIdx.x, lane = threadIdx.x;
    const int i_job = s.job0 + blockIdx.y;
    const int32_t * job = a.jobs[i_job];
    if (rkv_n_cells(job) <= a.par.window) {
        return;
    }
    extern __shared__ float row[]; // [n_embd]
    const int n_stats = a.n_embd + a.n_embd/2 + 1;
    float * mean   = a.stats + job[RKV_JOB_STREAM]*a.stats_stream + head*a.stats_head;
    float * length = mean + a.n_embd;
    const bool fresh = job[RKV_JOB_OLD_END] == job[RKV_JOB_BEGIN];
    float count = fresh ? 0.0f : mean[n_stats - 1];
    ggml_cuda_syncwarp();
    for (int e = lane; e < n_stats && fresh; e += WARP_SIZE) {
        mean[e] = 0.0f;
    }
    ggml_cuda_syncwarp();

    const float * q = a.q + job[RKV_JOB_STREAM]*a.q_stream + (int64_t) head*a.n_embd;
    for (int slot = 0; slot < a.par.window; ++slot) {
        const uint32_t slots = job[slot < 32 ? RKV_JOB_QUERY_LO : RKV_JOB_QUERY_HI];
        const int32_t  pos   = a.q_pos[i_job*a.q_pos_job + slot];
        if (!(slots >> slot%32 & 1) || pos < 0) {
            continue;
        }
        float2 x[NP];
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            x[p] = e < a.n_embd ? make_float2(q[slot*a.q_slot + e], q[slot*a.q_slot + e + 1]) : make_float2(0.0f, 0.0f);
        }
        if (a.par.n_hadamard > 0) {
            rkv_undo_hadamard(x, a.par.n_hadamard);
        }
        if (a.par.n_rot > 0 && a.rope) {
            rkv_undo_rope(a.par, x, a.n_embd, pos, a.rope, a.rope_row, row);
        }
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            if (e < a.n_embd) {
                row[e]     = x[p].x;
                row[e + 1] = x[p].y;
            }
        }
        ggml_cuda_syncwarp();
        count += 1.0f;
        for (int e = lane; e < a.n_embd; e += WARP_SIZE) {
            mean[e] += (row[e] - mean[e])/count;
        }
        for (int f = lane; f < a.par.n_rot/2; f += WARP_SIZE) {
            const int2 at = rkv_pair(a.par, f);
            length[f] += (sqrtf(row[at.x]*row[at.x] + row[at.y]*row[at.y]) - length[f])/count;
        }
        ggml_cuda_syncwarp(); // the row is used again
    }
    if (lane == 0) {
        mean[n_stats - 1] = count;
    }
}

// the mean query of head g of each group, rotated to the positions ahead, and what each pair's length counts for
static __global__ void rkv_series(const rkv_cuda_score_args a, const rkv_cuda_scratch s, int g) {
    const int head = blockIdx.x, tid = threadIdx.x;
    const int32_t * job = a.jobs[s.job0 + blockIdx.y];
    const int n = rkv_n_cells(job);
    if (n <= a.par.window) {
        return;
    }
    const float * mean   = a.stats + job[RKV_JOB_STREAM]*a.stats_stream + (head*a.n_group + g)*a.stats_head;
    const float * length = mean + a.n_embd;
    float * q      = s.series + (int64_t) (blockIdx.y*a.n_head_kv + head)*(a.n_embd + a.n_embd/2);
    float * weight = q + a.n_embd;
    for (int e = tid; e < a.n_embd; e += blockDim.x) {
        q[e] = mean[e];
    }
    __syncthreads();
    const int half = a.rope ? a.par.n_rot/2 : 0;
    const int last = a.pos[job[RKV_JOB_STREAM]*a.pos_stream + head*a.pos_head + job[RKV_JOB_BEGIN] + n - 1];
    const auto turn = [&](int p, int f, double & c, double & s) {
        const float * lo = a.rope + (p % RKV_ROPE_LO)*a.rope_row, * hi = a.rope + (RKV_ROPE_LO + p/RKV_ROPE_LO)*a.rope_row;
        c = (double) lo[f]*hi[f] - (double) lo[half + f]*hi[half + f];
        s = (double) lo[half + f]*hi[f] + (double) lo[f]*hi[half + f];
    };
    for (int f = tid; f < half; f += blockDim.x) {
        double c = 0.0, s = 0.0, c1, s1, c0, s0;
        for (int m = 0; m < RKV_TRI_OFFSETS; ++m) {
            turn(1 << m, f, c1, s1);
            c += c1/RKV_TRI_OFFSETS;
            s += s1/RKV_TRI_OFFSETS;
        }
        turn(last, f, c0, s0);
        const double cs = (c*c0 - s*s0)*a.par.rope_mscale, sn = (s*c0 + c*s0)*a.par.rope_mscale;
        const int2 at = rkv_pair(a.par, f);
        const float x = mean[at.x], y = mean[at.y];
        q[at.x] = (float) (x*cs - y*sn);
        q[at.y] = (float) (x*sn + y*cs);
        weight[f] = a.par.rope_mscale*fmaxf(0.0f, length[f] - sqrtf(x*x + y*y));
    }
}

template <int type, int NP>
static __global__ void __launch_bounds__(CELL_WARPS*WARP_SIZE) rkv_ahead(const rkv_cuda_score_args a, const rkv_cuda_scratch s, const cell_rows rows) {
    const int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x;
    const int32_t * job = a.jobs[s.job0 + blockIdx.z];
    const int jh = blockIdx.z*a.n_head_kv + head;
    const int last = min((tile + 1)*RKV_CUDA_TILE, rkv_n_cells(job) - a.par.window);
    extern __shared__ float shared[]; // [CELL_WARPS][n_embd]
    float * key = shared + threadIdx.y*a.n_embd;
    const float * q = s.series + (int64_t) jh*(a.n_embd + a.n_embd/2), * weight = q + a.n_embd;
    const int half = a.rope ? a.par.n_rot/2 : 0;
    for (int j = tile*RKV_CUDA_TILE + threadIdx.y; j < last; j += CELL_WARPS) {
        float2 x[NP];
        load_row<type>(x, rows, rows.row(job, head, j));
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            if (e < a.n_embd) {
                key[e]     = x[p].x;
                key[e + 1] = x[p].y;
            }
        }
        ggml_cuda_syncwarp();
        float sum = 0.0f;
        for (int e = lane; e < a.n_embd; e += WARP_SIZE) {
            sum += q[e]*key[e];
        }
        for (int f = lane; f < half; f += WARP_SIZE) {
            const int2 at = rkv_pair(a.par, f);
            sum += weight[f]*sqrtf(key[at.x]*key[at.x] + key[at.y]*key[at.y]);
        }
        sum = warp_reduce_sum(sum);
        if (lane == 0) {
            s.m[(int64_t) jh*s.n_pad + j] = sum;
        }
        ggml_cuda_syncwarp(); // the key's place is used again
    }
}

// z-scores of the cells that are not pinned; the largest of the group
static __global__ void __launch_bounds__(REDUCE_WARPS*WARP_SIZE) rkv_standardise(const rkv_cuda_score_args a, const rkv_cuda_scratch s, bool is_first) {
    const int head = blockIdx.x, tid = threadIdx.y*WARP_SIZE + threadIdx.x, n_thread = REDUCE_WARPS*WARP_SIZE;
    const int32_t * job = a.jobs[s.job0 + blockIdx.y];
    const int n_cand = rkv_n_cells(job) - a.par.window, pin = job[RKV_JOB_PIN];
    if (n_cand <= 0) {
        return;
    }
    __shared__ double shared[REDUCE_WARPS];
    const auto plus = [](double x, double y) { return x + y; };
    const float * x = s.m + (int64_t) (blockIdx.y*a.n_head_kv + head)*s.n_pad;
    float * z = a.dst + (s.job0 + blockIdx.y)*a.dst_job + head*a.dst_head;
    const int n_free = max(1, n_cand - pin);

    double total = 0.0, sq = 0.0;
    for (int j = pin + tid; j < n_cand; j += n_thread) {
        total += x[j];
    }
    const double mean = rkv_block_reduce<REDUCE_WARPS>(total, shared, plus)/n_free;
    for (int j = pin + tid; j < n_cand; j += n_thread) {
        sq += (x[j] - mean)*(x[j] - mean);
    }
    const double dev = sqrt(rkv_block_reduce<REDUCE_WARPS>(sq, shared, plus)/n_free);
    for (int j = tid; j < n_cand; j += n_thread) {
        const float y = j < pin || dev == 0.0 ? 0.0f : (float) ((x[j] - mean)/dev);
        z[j] = is_first || z[j] < y ? y : z[j];
    }
}

void rkv_cuda_trigonometric(const rkv_cuda_score_args & a, const rkv_cuda_scratch & s, int n_jobs, cudaStream_t stream) {
    const size_t row = sizeof(float)*a.n_embd;
    with_row(a.type_k, a.n_embd, [&](auto type, auto np) {
        rkv_statistics<decltype(np)::value><<<dim3(a.n_head_kv*a.n_group, n_jobs), WARP_SIZE, row, stream>>>(a, s);
        for (int g = 0; g < a.n_group; ++g) {
            rkv_series<<<dim3(a.n_head_kv, n_jobs), 128, 0, stream>>>(a, s, g);
            rkv_ahead<decltype(type)::value, decltype(np)::value><<<dim3(s.n_tile, a.n_head_kv, n_jobs), dim3(WARP_SIZE, CELL_WARPS),
                CELL_WARPS*row, stream>>>(a, s, keys_of(a));
            rkv_standardise<<<dim3(a.n_head_kv, n_jobs), dim3(WARP_SIZE, REDUCE_WARPS), 0, stream>>>(a, s, g == 0);
        }
    });
}
