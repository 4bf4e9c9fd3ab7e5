// What a cache or RoPE did to a row, undone by a warp: a lane holds elements 2*lane + 64*p of the row and the next one each.

#pragma once

#include "rkv-ops.h"

#include "common.cuh"

// as rkv_hadamard
template <int NP>
static __device__ void rkv_undo_hadamard(float2 (&x)[NP], int n) {
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        const float2 y = x[p];
        x[p] = make_float2(y.x + y.y, y.x - y.y);
    }
    for (int s = 2; s < min(n, 64); s *= 2) {
        const bool upper = threadIdx.x & (s/2);
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const float ox = __shfl_xor_sync(0xffffffff, x[p].x, s/2, WARP_SIZE);
            const float oy = __shfl_xor_sync(0xffffffff, x[p].y, s/2, WARP_SIZE);
            x[p] = upper ? make_float2(ox - x[p].x, oy - x[p].y) : make_float2(x[p].x + ox, x[p].y + oy);
        }
    }
#pragma unroll
    for (int sp = 1; sp < NP; sp *= 2) {
        if (64*sp < n) {
#pragma unroll
            for (int p = 0; p < NP; ++p) {
                if ((p & sp) == 0 && p + sp < NP) {
                    const float2 lo = x[p], hi = x[p + sp < NP ? p + sp : 0];
                    x[p] = make_float2(lo.x + hi.x, lo.y + hi.y);
                    x[p + sp < NP ? p + sp : 0] = make_float2(lo.x - hi.x, lo.y - hi.y);
                }
            }
        }
    }
    const float scale = 1.0f/sqrtf((float) n);
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        x[p].x *= scale;
        x[p].y *= scale;
    }
}

// as rkv_undo_rotation; row: n_embd floats of shared memory of this warp
template <int NP>
static __device__ void rkv_undo_rope(const rkv_op_params & par, float2 (&x)[NP], int n_embd, int32_t pos, const float * rope,
        int64_t rope_row, float * row) {
    const int     lane = threadIdx.x;
    const int     n_half = par.n_rot/2;
    const float * lo   = rope + (pos % RKV_ROPE_LO)*rope_row;
    const float * hi   = rope + (RKV_ROPE_LO + pos/RKV_ROPE_LO)*rope_row;
    const float   unit = 1.0f/par.rope_mscale;

    const auto turn = [&](int i, float & x0, float & x1) {
        const float c = lo[i]*hi[i] - lo[n_half + i]*hi[n_half + i];
        const float s = lo[n_half + i]*hi[i] + lo[i]*hi[n_half + i];
        const float y0 = x0*unit, y1 = x1*unit;
        x0 =  y0*c + y1*s;
        x1 = -y0*s + y1*c;
    };
    if (!(par.flags & RKV_FLAG_ROPE_NEOX)) {
#pragma unroll
        for (int p = 0; p < NP; ++p) {
            const int e = 2*lane + 64*p;
            if (e < par.n_rot) {
                turn(e/2, x[p].x, x[p].y);
            }
        }
        return;
    }
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        const int e = 2*lane + 64*p;
        if (e < n_embd) {
            row[e]     = x[p].x;
            row[e + 1] = x[p].y;
        }
    }
    ggml_cuda_syncwarp();
    for (int i = lane; i < n_half; i += WARP_SIZE) {
        turn(i, row[i], row[i + n_half]);
    }
    ggml_cuda_syncwarp();
#pragma unroll
    for (int p = 0; p < NP; ++p) {
        const int e = 2*lane + 64*p;
        if (e < n_embd) {
            x[p] = make_float2(row[e], row[e + 1]);
        }
    }
    ggml_cuda_syncwarp(); // the row is used again
}
