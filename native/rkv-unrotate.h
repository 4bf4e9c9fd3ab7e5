// Used by the CPU kernels and by the C API's introspection.

#pragma once

#include "rkv-ops.h"

#include <cmath>
#include <cstdint>

// fast Walsh-Hadamard transform, orthonormal: its own inverse
static inline void rkv_hadamard(float * x, int n) {
    for (int s = 1; s < n; s *= 2) {
        for (int i = 0; i < n; i += 2*s) {
            for (int j = i; j < i + s; ++j) {
                const float a = x[j], b = x[j + s];
                x[j]     = a + b;
                x[j + s] = a - b;
            }
        }
    }
    const float scale = 1.0f/std::sqrt((float) n);
    for (int i = 0; i < n; ++i) {
        x[i] *= scale;
    }
}

// RoPE (and the cache's Hadamard rotation) undone, in place: x [n_embd], rope [.., rope_row] as rkv-ops.h describes it
static inline void rkv_undo_rotation(const rkv_op_params & par, float * x, int n_embd, int32_t pos, const float * rope, int64_t rope_row) {
    if (par.n_hadamard > 0) {
        for (int i = 0; i < n_embd; i += par.n_hadamard) {
            rkv_hadamard(x + i, par.n_hadamard);
        }
    }
    if (par.n_rot == 0 || rope == nullptr) {
        return;
    }
    // angle(pos) = angle(lo) + angle(hi), by the addition theorems
    const int     half = par.n_rot/2;
    const float * lo   = rope + (pos % RKV_ROPE_LO)*rope_row;
    const float * hi   = rope + (RKV_ROPE_LO + pos/RKV_ROPE_LO)*rope_row;
    const bool    neox = par.flags & RKV_FLAG_ROPE_NEOX;
    const float   unit = 1.0f/par.rope_mscale;
    x += par.rope_begin;
    for (int i = 0; i < half; ++i) {
        const float c = lo[i]*hi[i] - lo[half + i]*hi[half + i];
        const float s = lo[half + i]*hi[i] + lo[i]*hi[half + i];
        float & x0 = neox ? x[i]        : x[2*i];
        float & x1 = neox ? x[i + half] : x[2*i + 1];
        const float y0 = x0*unit, y1 = x1*unit;
        x0 =  y0*c + y1*s;
        x1 = -y0*s + y1*c;
    }
}
