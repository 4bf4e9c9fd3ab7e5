// GGML_OP_RKV on Metal; native/cpu is the reference. Formulas and names are those of native/cpu/rkv-scorer.cpp.
//
// This file is also compiled as C++ and run on the CPU (docs/metal.md). Therefore, and because the default compilation
// assumes fast math: threadgroup memory is an argument only, simdgroup functions are called by all lanes of a simdgroup,
// NaN is told by its bits, and no result depends on the order of threads.

#include "common.h"
#include "rkv-metal-args.h"

struct rkv_job {
    int stream, begin, n, n_old, n_cand;
    uint slots_lo, slots_hi;
};

static inline rkv_job rkv_read_job(device const char * jobs, uint64_t job_size, int window, int i) {
    device const int32_t * f = (device const int32_t *) (jobs + i*job_size);
    rkv_job job;
    job.stream   = f[RKV_METAL_JOB_STREAM];
    job.begin    = f[RKV_METAL_JOB_BEGIN];
    job.n        = f[RKV_METAL_JOB_END] - job.begin;
    job.n_old    = f[RKV_METAL_JOB_OLD_END] - job.begin;
    job.n_cand   = max(0, job.n - window);
    job.slots_lo = (uint) f[RKV_METAL_JOB_QUERY_LO];
    job.slots_hi = (uint) f[RKV_METAL_JOB_QUERY_HI];
    return job;
}

static inline bool rkv_has_slot(thread const rkv_job & job, int slot) {
    return ((slot < 32 ? job.slots_lo >> slot : job.slots_hi >> (slot - 32)) & 1) != 0;
}

static inline int rkv_n_query(thread const rkv_job & job, int window) {
    int n = 0;
    for (int slot = 0; slot < window; ++slot) {
        n += rkv_has_slot(job, slot) ? 1 : 0;
    }
    return n;
}

// the scratch of a job and head
struct rkv_scratch {
    device float   * logits;
    device float   * mean;
    device float   * inv; // 1/length of a key
    device float   * col; // column sums of the cosines, then their means; `latest`: similarity to later keys
    device float   * cos; // cosine to the copy
    device int32_t * copy;
    device float   * sum; // of the normalised keys
};

static inline rkv_scratch rkv_scratch_of(constant rkv_metal_score_args & args, device float * base, int h, int job) {
    const uint64_t n = args.n_cells;
    rkv_scratch s;
    s.logits = base + ((uint64_t) job*args.n_head_kv + h)*args.slice;
    s.mean   = s.logits + args.window*n;
    s.inv    = s.mean + n;
    s.col    = s.inv  + n;
    s.cos    = s.col  + n;
    s.copy   = (device int32_t *) (s.cos + n);
    s.sum    = s.cos  + 2*n;
    return s;
}

//
// reductions over a threadgroup, in a fixed order; shmem: one element per simdgroup
//

static inline float rkv_group_sum(float x, threadgroup float * shmem, int nsg, ushort lane, ushort sg) {
    x = simd_sum(x);
    threadgroup_barrier(mem_flags::mem_threadgroup); // shmem may still be read
    if (lane == 0) {
        shmem[sg] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0.0f;
    for (int i = 0; i < nsg; ++i) {
        total += shmem[i];
    }
    return total;
}

static inline float rkv_group_max(float x, threadgroup float * shmem, int nsg, ushort lane, ushort sg) {
    x = simd_max(x);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
        shmem[sg] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float top = shmem[0];
    for (int i = 1; i < nsg; ++i) {
        top = max(top, shmem[i]);
    }
    return top;
}

static inline uint rkv_group_sum_uint(uint x, threadgroup uint * shmem, int nsg, ushort lane, ushort sg) {
    x = simd_sum(x);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
        shmem[sg] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint total = 0;
    for (int i = 0; i < nsg; ++i) {
        total += shmem[i];
    }
    return total;
}

// sum over the threads before this one; *total over all
static inline uint rkv_group_prefix(uint x, thread uint * total, threadgroup uint * shmem, int nsg, ushort lane, ushort sg) {
    const uint before = simd_prefix_exclusive_sum(x);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == RKV_METAL_SIMD - 1) {
        shmem[sg] = before + x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint res = before;
    *total = 0;
    for (int i = 0; i < nsg; ++i) {
        res    += i < (int) sg ? shmem[i] : 0;
        *total += shmem[i];
    }
    return res;
}

//
// keys
//

// block quants of 32: scale, [minimum,] [fifth bits,] nibbles or bytes
static inline float rkv_dequantize(device const char * src, int type, int i) {
    const int b = i/32, l = i%32;
    switch (type) {
        case RKV_METAL_TYPE_Q8_0: {
            device const char * x = src + b*34;
            return (float) *(device const half *) x * (float) ((device const int8_t *) (x + 2))[l];
        }
        case RKV_METAL_TYPE_Q4_0: {
            device const char * x = src + b*18;
            const int q = ((device const uint8_t *) (x + 2))[l%16] >> 4*(l/16) & 15;
            return (float) *(device const half *) x * (float) (q - 8);
        }
        case RKV_METAL_TYPE_Q4_1: {
            device const char * x = src + b*20;
            const int q = ((device const uint8_t *) (x + 4))[l%16] >> 4*(l/16) & 15;
            return (float) *(device const half *) x * (float) q + (float) *(device const half *) (x + 2);
        }
        case RKV_METAL_TYPE_Q5_0: {
            device const char * x = src + b*22;
            const int hi = ((device const uint8_t *) (x + 2))[l/8] >> l%8 & 1;
            const int q  = ((device const uint8_t *) (x + 6))[l%16] >> 4*(l/16) & 15;
            return (float) *(device const half *) x * (float) ((hi << 4 | q) - 16);
        }
        case RKV_METAL_TYPE_Q5_1: {
            device const char * x = src + b*24;
            const int hi = ((device const uint8_t *) (x + 4))[l/8] >> l%8 & 1;
            const int q  = ((device const uint8_t *) (x + 8))[l%16] >> 4*(l/16) & 15;
            return (float) *(device const half *) x * (float) (hi << 4 | q) + (float) *(device const half *) (x + 2);
        }
        default: { // RKV_METAL_TYPE_IQ4_NL
            device const char * x = src + b*18;
            const int q = ((device const uint8_t *) (x + 2))[l%16] >> 4*(l/16) & 15;
            return (float) *(device const half *) x * kvalues_iq4nl_f[q];
        }
    }
}

// a key as cached; lane l writes elements l, l + 32, .. only
static inline void rkv_load_raw(threadgroup float * x, device const char * src, int type, int n, ushort lane) {
    switch (type) {
        case RKV_METAL_TYPE_F32:
            for (int i = lane; i < n; i += RKV_METAL_SIMD) {
                x[i] = ((device const float *) src)[i];
            }
            break;
        case RKV_METAL_TYPE_F16:
            for (int i = lane; i < n; i += RKV_METAL_SIMD) {
                x[i] = (float) ((device const half *) src)[i];
            }
            break;
        case RKV_METAL_TYPE_BF16: // not every device has bfloat
            for (int i = lane; i < n; i += RKV_METAL_SIMD) {
                x[i] = as_type<float>((uint) ((device const uint16_t *) src)[i] << 16);
            }
            break;
        default:
            for (int i = lane; i < n; i += RKV_METAL_SIMD) {
                x[i] = rkv_dequantize(src, type, i);
            }
            break;
    }
}

static inline float rkv_inverse_length(threadgroup const float * x, int n, ushort lane) {
    float sq = 0.0f;
    for (int i = lane; i < n; i += RKV_METAL_SIMD) {
        sq += x[i]*x[i];
    }
    return 1.0f/(precise::sqrt(simd_sum(sq)) + 1e-8f);
}

static inline void rkv_scale_row(threadgroup float * x, int n, float by, ushort lane) {
    for (int i = lane; i < n; i += RKV_METAL_SIMD) {
        x[i] *= by;
    }
}

static inline float rkv_dot_rows(threadgroup const float * a, threadgroup const float * b, int n, ushort lane) {
    float acc = 0.0f;
    for (int i = lane; i < n; i += RKV_METAL_SIMD) {
        acc += a[i]*b[i];
    }
    return simd_sum(acc);
}

// Hadamard rotation and RoPE undone in place, as rkv_undo_rotation does; by one simdgroup
static inline void rkv_unrotate(constant rkv_metal_score_args & args, threadgroup float * x, int pos,
        device const float * rope, ushort lane) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (args.n_hadamard > 0) {
        for (int s = 1; s < args.n_hadamard; s *= 2) {
            for (int p = lane; p < args.n_embd/2; p += RKV_METAL_SIMD) {
                const int i = p/s*2*s + p%s;
                const float a = x[i], b = x[i + s];
                x[i]     = a + b;
                x[i + s] = a - b;
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
        rkv_scale_row(x, args.n_embd, 1.0f/precise::sqrt((float) args.n_hadamard), lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int  half_rot = args.n_rot/2;
    const bool neox     = (args.flags & RKV_METAL_FLAG_ROPE_NEOX) != 0;
    device const float * lo = rope + (uint64_t) (pos % RKV_METAL_ROPE_LO)*args.rope_row;
    device const float * hi = rope + (uint64_t) (RKV_METAL_ROPE_LO + pos/RKV_METAL_ROPE_LO)*args.rope_row;
    for (int i = lane; i < half_rot; i += RKV_METAL_SIMD) {
        const float c = lo[i]*hi[i] - lo[half_rot + i]*hi[half_rot + i];
        const float s = lo[half_rot + i]*hi[i] + lo[i]*hi[half_rot + i];
        const int  i0 = neox ? i : 2*i;
        const int  i1 = neox ? i + half_rot : 2*i + 1;
        const float y0 = x[i0]*args.rope_unit, y1 = x[i1]*args.rope_unit;
        x[i0] =  y0*c + y1*s;
        x[i1] = -y0*s + y1*c;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

//
// importance
//

// logits of the window's queries over the candidates, the largest of each group; and the keys' lengths
// grid: blocks of nsg*RKV_METAL_KEYS cells, heads, jobs
kernel void kernel_rkv_logits(
        constant rkv_metal_score_args & args,
        device const char  * k,
        device const char  * q,
        device const char  * jobs,
        device       float * scratch,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int h = tgpig[1];
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, h, tgpig[2]);

    const int n  = args.n_embd;
    const int j0 = ((int) tgpig[0]*args.nsg + sg)*RKV_METAL_KEYS;
    if (job.n_cand == 0 || j0 >= job.n) {
        return;
    }
    threadgroup float * x = shmem + sg*RKV_METAL_KEYS*n;
    device const char * kh = k + job.stream*args.k_stream + job.begin*args.k_cell + h*args.k_head;
    for (int r = 0; r < RKV_METAL_KEYS; ++r) {
        // past the end the last key stands in, so that all rows hold numbers
        rkv_load_raw(x + r*n, kh + min(j0 + r, job.n - 1)*args.k_cell, args.k_type, n, lane);
        const float inv = rkv_inverse_length(x + r*n, n, lane);
        if (lane == 0 && j0 + r < job.n) {
            s.inv[j0 + r] = inv;
        }
    }
    if (j0 >= job.n_cand) {
        return;
    }

    device float * out = s.logits + j0;
    for (int slot = 0; slot < args.window; ++slot) {
        if (!rkv_has_slot(job, slot)) {
            continue;
        }
        float top[RKV_METAL_KEYS];
        for (int g = 0; g < args.n_group; ++g) {
            device const float * qg = (device const float *) (q + job.stream*args.q_stream + slot*args.q_slot) + (h*args.n_group + g)*n;
            float acc[RKV_METAL_KEYS];
            for (int r = 0; r < RKV_METAL_KEYS; ++r) {
                acc[r] = 0.0f;
            }
            for (int i = lane; i < n; i += RKV_METAL_SIMD) {
                const float qi = qg[i];
                for (int r = 0; r < RKV_METAL_KEYS; ++r) {
                    acc[r] += qi*x[r*n + i];
                }
            }
            for (int r = 0; r < RKV_METAL_KEYS; ++r) {
                const float l = simd_sum(acc[r]);
                top[r] = g == 0 ? l : max(top[r], l);
            }
        }
        if (lane == 0) {
            for (int r = 0; r < RKV_METAL_KEYS && j0 + r < job.n_cand; ++r) {
                const float l = top[r]*args.scale;
                out[r] = args.softcap > 0.0f ? args.softcap*precise::tanh(l/args.softcap) : l;
            }
        }
        out += args.n_cells;
    }
}

// softmax of each query's logits; grid: window, heads, jobs
kernel void kernel_rkv_softmax(
        constant rkv_metal_score_args & args,
        device const char  * jobs,
        device       float * scratch,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int nsg = RKV_METAL_THREADS/RKV_METAL_SIMD;
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, tgpig[1], tgpig[2]);
    if (job.n_cand == 0 || (int) tgpig[0] >= rkv_n_query(job, args.window)) {
        return;
    }

    device float * x = s.logits + (uint64_t) tgpig[0]*args.n_cells;
    float top = x[0];
    for (int j = tiitg; j < job.n_cand; j += RKV_METAL_THREADS) {
        top = max(top, x[j]);
    }
    top = rkv_group_max(top, shmem, nsg, lane, sg);

    float total = 0.0f;
    for (int j = tiitg; j < job.n_cand; j += RKV_METAL_THREADS) {
        const float e = precise::exp(x[j] - top);
        total += e;
    }
    total = rkv_group_sum(total, shmem, nsg, lane, sg);
    const float inv = 1.0f/total;
    for (int j = tiitg; j < job.n_cand; j += RKV_METAL_THREADS) {
        x[j] = precise::exp(x[j] - top)*inv;
    }
}

// mean over the window's queries; grid: blocks of cells, heads, jobs
kernel void kernel_rkv_mean(
        constant rkv_metal_score_args & args,
        device const char  * jobs,
        device       float * scratch,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]]) {
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, tgpig[1], tgpig[2]);

    const int j = (int) tgpig[0]*RKV_METAL_THREADS + tiitg;
    if (j >= job.n_cand) {
        return;
    }
    const int   n_query = rkv_n_query(job, args.window);
    const float inv     = 1.0f/max(1, n_query);
    float mean = 0.0f;
    for (int i = 0; i < n_query; ++i) {
        mean += s.logits[(uint64_t) i*args.n_cells + j]*inv;
    }
    s.mean[j] = mean;
}

//
// redundancy
//

// sum of the normalised keys; grid: 1, heads, jobs
kernel void kernel_rkv_key_sum(
        constant rkv_metal_score_args & args,
        device const char  * k,
        device const char  * jobs,
        device       float * scratch,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int h = tgpig[1];
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, h, tgpig[2]);
    if (job.n_cand == 0) {
        return;
    }
    const int n = args.n_embd;
    threadgroup float * acc = shmem + sg*n;
    threadgroup float * x   = shmem + (args.nsg + sg)*n;
    device const char * kh  = k + job.stream*args.k_stream + job.begin*args.k_cell + h*args.k_head;

    for (int i = lane; i < n; i += RKV_METAL_SIMD) {
        acc[i] = 0.0f;
    }
    for (int j = sg; j < job.n; j += args.nsg) {
        rkv_load_raw(x, kh + j*args.k_cell, args.k_type, n, lane);
        const float inv = s.inv[j];
        for (int i = lane; i < n; i += RKV_METAL_SIMD) {
            acc[i] += x[i]*inv;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tiitg; i < n; i += args.nsg*RKV_METAL_SIMD) {
        float total = 0.0f;
        for (int r = 0; r < args.nsg; ++r) {
            total += shmem[r*n + i];
        }
        s.sum[i] = total;
    }
}

// For a block of rows: their column sums, linear in n, and their most recent copies, searched from the newest columns
// on until every row has found its own. grid: blocks of n_row cells, heads, jobs
kernel void kernel_rkv_copies(
        constant rkv_metal_score_args & args,
        device const char  * k,
        device const char  * jobs,
        device       float * scratch,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int h = tgpig[1];
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, h, tgpig[2]);

    const int i0 = (int) tgpig[0]*args.n_row;
    if (job.n_cand == 0 || i0 >= job.n) {
        return;
    }
    const int n    = args.n_embd;
    const int rows = min(args.n_row, job.n - i0);
    const bool reference = (args.flags & RKV_METAL_FLAG_REFERENCE) != 0;

    threadgroup float   * x   = shmem;                    // [n_row][n]
    threadgroup float   * y   = x + (args.n_row + sg)*n;  // one column per simdgroup
    threadgroup float   * hit_cos = x + (args.n_row + args.nsg)*n; // [nsg][n_row]
    threadgroup int32_t * hit = (threadgroup int32_t *) (hit_cos + args.nsg*args.n_row);
    device const char   * kh  = k + job.stream*args.k_stream + job.begin*args.k_cell + h*args.k_head;

    for (int r = sg; r < rows; r += args.nsg) {
        threadgroup float * xr = x + r*n;
        rkv_load_raw(xr, kh + (i0 + r)*args.k_cell, args.k_type, n, lane);
        rkv_scale_row(xr, n, s.inv[i0 + r], lane);
        float col = 0.0f;
        for (int i = lane; i < n; i += RKV_METAL_SIMD) {
            col += xr[i]*(s.sum[i] - xr[i]);
        }
        col = simd_sum(col);
        if (lane == 0) {
            s.col[i0 + r] = col;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // the same in all threads: which rows still search
    uint open = rows < 32 ? (1u << rows) - 1 : 0xffffffffu;
    // lane r of the first simdgroup: cosine of row r to column 0
    float first = 0.0f;

    const int width = args.nsg*RKV_METAL_STEP;
    for (int c0 = (job.n - 1)/width*width; c0 >= 0 && open != 0; c0 -= width) {
        uint  mine     = open; // rows for which this simdgroup has not found a newer one
        int   my_hit   = -1;
        float my_cos   = 0.0f;
        for (int c = RKV_METAL_STEP - 1; c >= 0 && mine != 0; --c) {
            const int j = c0 + sg*RKV_METAL_STEP + c;
            if (j >= job.n) {
                continue;
            }
            rkv_load_raw(y, kh + j*args.k_cell, args.k_type, n, lane);
            rkv_scale_row(y, n, s.inv[j], lane);
            for (int r = 0; r < rows; ++r) {
                if ((mine >> r & 1) == 0) {
                    continue;
                }
                const float cij = j == i0 + r ? 0.0f : rkv_dot_rows(x + r*n, y, n, lane);
                if (j == 0 && lane == r) {
                    first = cij;
                }
                if (cij > args.threshold && j != i0 + r) {
                    mine &= ~(1u << r);
                    if (lane == r) {
                        my_hit = j;
                        my_cos = cij;
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup); // hit may still be read
        if (lane < rows) {
            hit[sg*args.n_row + lane] = my_hit;
            hit_cos[sg*args.n_row + lane] = my_cos;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int r = 0; r < rows; ++r) {
            if ((open >> r & 1) == 0) {
                continue;
            }
            for (int g = args.nsg - 1; g >= 0; --g) { // later simdgroups have newer columns
                if (hit[g*args.n_row + r] >= 0) {
                    open &= ~(1u << r);
                    if (tiitg == 0) {
                        s.copy[i0 + r] = hit[g*args.n_row + r];
                        s.cos [i0 + r] = hit_cos[g*args.n_row + r];
                    }
                    break;
                }
            }
        }
    }
    if (sg == 0 && lane < rows && (open >> lane & 1) != 0) {
        s.copy[i0 + lane] = reference ? 0 : -1; // the authors' code zeroes column 0 where there is no copy
        s.cos [i0 + lane] = reference ? first : 0.0f;
    }
}

// column means without the spared copies, taken off in the order of rows; grid: blocks of cells, heads, jobs
kernel void kernel_rkv_column_means(
        constant rkv_metal_score_args & args,
        device const char  * jobs,
        device       float * scratch,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]]) {
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, tgpig[1], tgpig[2]);

    const int j0 = (int) tgpig[0]*RKV_METAL_THREADS;
    if (job.n_cand == 0 || j0 >= job.n) {
        return;
    }
    threadgroup float   * cos  = shmem;
    threadgroup int32_t * copy = (threadgroup int32_t *) (shmem + RKV_METAL_THREADS);

    const int j = j0 + tiitg;
    float m = j < job.n ? s.col[j] : 0.0f;
    for (int i0 = 0; i0 < job.n; i0 += RKV_METAL_THREADS) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int i = i0 + tiitg;
        cos [tiitg] = i < job.n ? s.cos [i] : 0.0f;
        copy[tiitg] = i < job.n ? s.copy[i] : -1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int l = 0; l < RKV_METAL_THREADS; ++l) {
            if (copy[l] == j) {
                m -= cos[l];
            }
        }
    }
    if (j < job.n) {
        s.col[j] = m/job.n;
    }
}

//
// similarity to later keys
//

static inline void rkv_keep_highest(thread float * best, int count, float x) {
    if (x > best[count - 1]) {
        for (int i = 0; i < count; ++i) {
            if (x > best[i]) {
                const float lower = best[i];
                best[i] = x;
                x = lower;
            }
        }
    }
}

static inline void rkv_load_unrotated(constant rkv_metal_score_args & args, threadgroup float * x, device const char * src,
        int pos, device const float * rope, ushort lane) {
    rkv_load_raw(x, src, args.k_type, args.n_embd, lane);
    rkv_unrotate(args, x, pos, rope, lane);
    rkv_scale_row(x, args.n_embd, rkv_inverse_length(x, args.n_embd, lane), lane);
}

// the n_sim highest of each row, kept with the cell; only columns since the last pass are new
// grid: blocks of n_row cells, heads, jobs
kernel void kernel_rkv_later(
        constant rkv_metal_score_args & args,
        device const char  * k,
        device const char  * jobs,
        device const char  * pos,
        device       char  * aux,
        device const float * rope,
        device       float * scratch,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int h = tgpig[1];
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, h, tgpig[2]);

    const int i0 = (int) tgpig[0]*args.n_row;
    if (job.n_cand == 0 || i0 >= job.n) {
        return;
    }
    const int n    = args.n_embd;
    const int rows = min(args.n_row, job.n - i0);

    threadgroup float * x    = shmem;
    threadgroup float * y    = x + (args.n_row + sg)*n;
    threadgroup float * list = x + (args.n_row + args.nsg)*n; // [nsg][n_row][n_sim]
    device const char * kh   = k + job.stream*args.k_stream + job.begin*args.k_cell + h*args.k_head;
    device const int32_t * ph = (device const int32_t *) (pos + job.stream*args.pos_stream + h*args.pos_head) + job.begin;

    for (int r = sg; r < rows; r += args.nsg) {
        rkv_load_unrotated(args, x + r*n, kh + (i0 + r)*args.k_cell, ph[i0 + r], rope, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float best[RKV_METAL_MAX_SIM]; // lane r: those of row r
    for (int i = 0; i < RKV_METAL_MAX_SIM; ++i) {
        best[i] = -1.0f;
    }
    for (int j = max(i0 + 1, job.n_old) + sg; j < job.n; j += args.nsg) {
        rkv_load_unrotated(args, y, kh + j*args.k_cell, ph[j], rope, lane);
        for (int r = 0; r < rows && i0 + r < j; ++r) {
            const float cij = rkv_dot_rows(x + r*n, y, n, lane);
            if (lane == r) {
                rkv_keep_highest(best, args.n_sim, cij);
            }
        }
    }
    if (lane < rows) {
        for (int i = 0; i < args.n_sim; ++i) {
            list[(sg*args.n_row + lane)*args.n_sim + i] = best[i];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (sg == 0 && lane < rows) {
        const int row = i0 + lane;
        device float * stored = (device float *) (aux + job.stream*args.aux_stream + h*args.aux_head + (job.begin + row)*args.aux_cell);
        for (int i = 0; i < args.n_sim; ++i) {
            best[i] = row < job.n_old ? stored[i] : -1.0f;
        }
        for (int g = 0; g < args.nsg; ++g) {
            for (int i = 0; i < args.n_sim; ++i) {
                rkv_keep_highest(best, args.n_sim, list[(g*args.n_row + lane)*args.n_sim + i]);
            }
        }
        float total = 0.0f;
        for (int i = 0; i < args.n_sim; ++i) {
            stored[i] = best[i];
            total += best[i];
        }
        s.col[row] = total/args.n_sim;
    }
}

//
// the policies' formulas; grid: 1, heads, jobs
//

kernel void kernel_rkv_score(
        constant rkv_metal_score_args & args,
        device const char  * jobs,
        device       float * scratch,
        device       char  * dst,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int nsg = RKV_METAL_THREADS/RKV_METAL_SIMD;
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, tgpig[1], tgpig[2]);
    if (job.n_cand == 0) {
        return;
    }
    device float * z = (device float *) (dst + tgpig[1]*args.z_head + tgpig[2]*args.z_job);

    float unit = 1.0f, top = 0.0f;
    if (args.policy == RKV_METAL_POLICY_LATEST) { // the largest mean is the largest of the pooled ones
        float peak = 0.0f;
        for (int j = tiitg; j < job.n_cand; j += RKV_METAL_THREADS) {
            peak = max(peak, s.mean[j]);
        }
        peak = rkv_group_max(peak, shmem, nsg, lane, sg);
        unit = peak > 0.0f ? 1.0f/peak : 0.0f;
    } else if (args.policy == RKV_METAL_POLICY_RKV) {
        top = s.col[0];
        for (int j = tiitg; j < job.n; j += RKV_METAL_THREADS) {
            top = max(top, s.col[j]);
        }
        top = rkv_group_max(top, shmem, nsg, lane, sg);
        float total = 0.0f;
        for (int j = tiitg; j < job.n; j += RKV_METAL_THREADS) {
            total += precise::exp(s.col[j] - top);
        }
        unit = 1.0f/rkv_group_sum(total, shmem, nsg, lane, sg);
    }

    const int reach = args.pool/2;
    for (int j = tiitg; j < job.n_cand; j += RKV_METAL_THREADS) {
        if (args.policy == RKV_METAL_POLICY_STREAMING) {
            z[j] = (float) j;
            continue;
        }
        const int hi = min(job.n_cand - 1, j + reach);
        float importance = s.mean[max(0, j - reach)];
        for (int l = max(0, j - reach) + 1; l <= hi; ++l) {
            importance = max(importance, s.mean[l]);
        }
        switch (args.policy) {
            case RKV_METAL_POLICY_RKV:
                z[j] = args.lambda*importance - (1.0f - args.lambda)*(precise::exp(s.col[j] - top)*unit);
                break;
            case RKV_METAL_POLICY_LATEST:
                z[j] = args.lambda*importance*unit - (1.0f - args.lambda)*s.col[j];
                break;
            default: // SnapKV
                z[j] = importance;
                break;
        }
    }
}

//
// `latest`: how far values are from their mean, added to the score of the keys; grid: 1, heads, jobs
//

static inline float rkv_element(device const char * src, int type, int i) {
    switch (type) {
        case RKV_METAL_TYPE_F32:  return ((device const float *) src)[i];
        case RKV_METAL_TYPE_F16:  return (float) ((device const half *) src)[i];
        case RKV_METAL_TYPE_BF16: return as_type<float>((uint) ((device const uint16_t *) src)[i] << 16);
        default:                  return rkv_dequantize(src, type, i);
    }
}

// a rotation of the cache's values does not change distances: it is not undone
static inline float rkv_value(constant rkv_metal_score_args & args, device const char * cell, int i) {
    return args.v_el == 0 ? rkv_element(cell, args.v_type, i) : rkv_element(cell + i*args.v_el, args.v_type, 0);
}

// x brought to shares of a logistic distribution: its mean, and 1/deviation
static inline float2 rkv_spread(device const float * x, int n, threadgroup float * shmem, int nsg, ushort tiitg, ushort lane, ushort sg) {
    float total = 0.0f;
    for (int j = tiitg; j < n; j += RKV_METAL_THREADS) {
        total += x[j];
    }
    const float mean = rkv_group_sum(total, shmem, nsg, lane, sg)/n;
    float sq = 0.0f;
    for (int j = tiitg; j < n; j += RKV_METAL_THREADS) {
        sq += (x[j] - mean)*(x[j] - mean);
    }
    return float2(mean, 1.0f/precise::sqrt(rkv_group_sum(sq, shmem, nsg, lane, sg)/n + RKV_METAL_LEAST_VARIANCE));
}

static inline float rkv_logistic(float x, float2 spread) {
    const float t = RKV_METAL_LOGISTIC_SCALE*(x - spread.x)*spread.y;
    const float e = precise::exp(-fabs(t));
    return (t < 0.0f ? e : 1.0f)/(1.0f + e);
}

// shmem: a float for each simdgroup, then [n_embd_v]
kernel void kernel_rkv_values(
        constant rkv_metal_score_args & args,
        device const char  * v,
        device const char  * jobs,
        device       float * scratch,
        device       char  * dst,
        threadgroup  float * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int nsg = RKV_METAL_THREADS/RKV_METAL_SIMD;
    const rkv_job     job = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    const rkv_scratch s   = rkv_scratch_of(args, scratch, tgpig[1], tgpig[2]);
    if (job.n_cand == 0) {
        return;
    }
    device float * z = (device float *) (dst + tgpig[1]*args.z_head + tgpig[2]*args.z_job);
    device const char * cells = v + job.stream*args.v_stream + job.begin*args.v_cell + tgpig[1]*args.v_head;
    threadgroup float * mean = shmem + nsg;

    for (int i = tiitg; i < args.n_embd_v; i += RKV_METAL_THREADS) {
        float total = 0.0f;
        for (int j = 0; j < job.n; ++j) {
            total += rkv_value(args, cells + j*args.v_cell, i);
        }
        mean[i] = total/job.n;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = sg; j < job.n_cand; j += nsg) {
        float sq = 0.0f;
        for (int i = lane; i < args.n_embd_v; i += RKV_METAL_SIMD) {
            const float d = rkv_value(args, cells + j*args.v_cell, i) - mean[i];
            sq += d*d;
        }
        sq = simd_sum(sq);
        if (lane == 0) {
            s.mean[j] = precise::sqrt(sq); // the importance has been used
        }
    }
    threadgroup_barrier(mem_flags::mem_device);
    const float2 of_keys   = rkv_spread(z, job.n_cand, shmem, nsg, tiitg, lane, sg);
    const float2 of_values = rkv_spread(s.mean, job.n_cand, shmem, nsg, tiitg, lane, sg);
    for (int j = tiitg; j < job.n_cand; j += RKV_METAL_THREADS) {
        z[j] = rkv_logistic(z[j], of_keys) + args.value_weight*rkv_logistic(s.mean[j], of_values);
    }
}

//
// selection: the n_top highest by bisection over the scores' bits, then written in order; grid: 1, heads, jobs
//

// ascending with the score; NaN below all, -0 as 0
static inline uint rkv_order(float z) {
    uint bits = as_type<uint>(z);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        bits = 0xff800000u; // -inf
    }
    if (bits == 0x80000000u) {
        bits = 0;
    }
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

kernel void kernel_rkv_select(
        constant rkv_metal_select_args & args,
        device const char * score,
        device const char * jobs,
        device       char * dst,
        threadgroup  uint * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort lane[[thread_index_in_simdgroup]],
        ushort sg[[simdgroup_index_in_threadgroup]]) {
    const int nsg = RKV_METAL_THREADS/RKV_METAL_SIMD;
    const rkv_job job  = rkv_read_job(jobs, args.job_size, args.window, tgpig[2]);
    device const int32_t * f = (device const int32_t *) (jobs + tgpig[2]*args.job_size);
    const int     keep = f[RKV_METAL_JOB_KEEP], pin = f[RKV_METAL_JOB_PIN];

    device const float * z   = (device const float *) (score + tgpig[1]*args.z_head + tgpig[2]*args.z_job) + pin;
    device int32_t     * out = (device int32_t *) (dst + tgpig[1]*args.idx_head + tgpig[2]*args.idx_job);

    if (keep >= job.n) {
        for (int j = tiitg; j < job.n; j += RKV_METAL_THREADS) {
            out[j] = job.begin + j;
        }
        return;
    }
    const int  n_cand = job.n - args.window - pin;
    const uint n_top  = max(0, keep - args.window - pin);

    // the largest value that at least n_top candidates reach
    uint level = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const uint higher = level | 1u << bit;
        uint count = 0;
        for (int j = tiitg; j < n_cand; j += RKV_METAL_THREADS) {
            count += rkv_order(z[j]) >= higher ? 1 : 0;
        }
        if (rkv_group_sum_uint(count, shmem, nsg, lane, sg) >= n_top) {
            level = higher;
        }
    }
    uint above = 0;
    for (int j = tiitg; j < n_cand; j += RKV_METAL_THREADS) {
        above += rkv_order(z[j]) > level ? 1 : 0;
    }
    above = rkv_group_sum_uint(above, shmem, nsg, lane, sg);

    const uint n_equal = n_top > above ? n_top - above : 0; // of those at the level, the first ones
    uint equal_before = 0, kept_before = 0;
    for (int j0 = 0; j0 < n_cand; j0 += RKV_METAL_THREADS) {
        const int  j     = j0 + tiitg;
        const uint order = j < n_cand ? rkv_order(z[j]) : 0;
        const bool equal = j < n_cand && order == level;
        uint total;
        const uint rank = equal_before + rkv_group_prefix(equal ? 1 : 0, &total, shmem, nsg, lane, sg);
        equal_before += total;

        const bool kept = n_top > 0 && j < n_cand && (order > level || (equal && rank < n_equal));
        const uint at = kept_before + rkv_group_prefix(kept ? 1 : 0, &total, shmem, nsg, lane, sg);
        kept_before += total;
        if (kept) {
            out[pin + at] = job.begin + pin + j;
        }
    }
    for (int j = tiitg; j < pin; j += RKV_METAL_THREADS) {
        out[j] = job.begin + j;
    }
    for (int j = tiitg; j < args.window; j += RKV_METAL_THREADS) {
        out[keep - args.window + j] = job.begin + job.n - args.window + j;
    }
}

//
// gather in place; grid: lines, jobs
//

// A block of words is read before it is written. Rows move towards the front and ascend, so what later blocks read lies
// behind what earlier ones write.
template<typename T>
static inline void rkv_compact_words(constant rkv_metal_compact_args & args, device T * data, device const char * idx,
        device const char * jobs, uint3 tgpig, ushort tiitg) {
    device const int32_t * f    = (device const int32_t *) (jobs + tgpig[1]*args.job_size);
    device const int32_t * rows = (device const int32_t *) (idx + tgpig[0]/args.ratio*args.idx_line + tgpig[1]*args.idx_job);
    device T * base = data + tgpig[0]*args.line + f[RKV_METAL_JOB_STREAM]*args.stream;
    device T * to   = base + f[RKV_METAL_JOB_DST]*args.step;

    const int n     = min(f[RKV_METAL_JOB_KEEP], f[RKV_METAL_JOB_END] - f[RKV_METAL_JOB_BEGIN]);
    const int total = n*args.unit;
    for (int w0 = 0; w0 < total; w0 += RKV_METAL_THREADS*RKV_METAL_WORDS) {
        T word[RKV_METAL_WORDS];
        for (int i = 0; i < RKV_METAL_WORDS; ++i) {
            const int w = w0 + i*RKV_METAL_THREADS + tiitg;
            if (w < total) {
                word[i] = base[rows[w/args.unit]*args.step + w%args.unit];
            }
        }
        threadgroup_barrier(mem_flags::mem_device);
        for (int i = 0; i < RKV_METAL_WORDS; ++i) {
            const int w = w0 + i*RKV_METAL_THREADS + tiitg;
            if (w < total) {
                to[w/args.unit*args.step + w%args.unit] = word[i];
            }
        }
    }
}

kernel void kernel_rkv_compact_4(
        constant rkv_metal_compact_args & args,
        device       uint32_t * data,
        device const char     * idx,
        device const char     * jobs,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]]) {
    rkv_compact_words(args, data, idx, jobs, tgpig, tiitg);
}

kernel void kernel_rkv_compact_2(
        constant rkv_metal_compact_args & args,
        device       uint16_t * data,
        device const char     * idx,
        device const char     * jobs,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]]) {
    rkv_compact_words(args, data, idx, jobs, tgpig, tiitg);
}

// positions of new cells to all heads; grid: heads, jobs
kernel void kernel_rkv_positions(
        constant rkv_metal_positions_args & args,
        device const char * src,
        device const char * jobs,
        device       char * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]]) {
    device const int32_t * f    = (device const int32_t *) (jobs + tgpig[1]*args.job_size);
    device const int32_t * from = (device const int32_t *) (src + tgpig[1]*args.src_job) + f[RKV_METAL_JOB_SHIFT];
    device int32_t * to = (device int32_t *) (dst + tgpig[0]*args.pos_head + f[RKV_METAL_JOB_STREAM]*args.pos_stream);
    for (int r = f[RKV_METAL_JOB_OLD_END] + tiitg; r < f[RKV_METAL_JOB_END]; r += RKV_METAL_THREADS) {
        to[r] = from[r];
    }
}
