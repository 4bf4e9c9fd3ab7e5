// G-KV (arXiv 2512.00504): the largest share of attention that a cell ever had, fading, and not redundant. Importance and
// redundancy are each divided by their maximum.

#include "rkv-scorer.h"

#include <algorithm>

static void divide_by_maximum(float * x, int n) {
    const float peak = *std::max_element(x, x + n);
    const float unit = peak > 0.0f ? 1.0f/peak : 0.0f;
    std::for_each(x, x + n, [unit](float & v) { v *= unit; });
}

void rkv_policy_gkv(rkv_scorer & s, float * z, size_t z_head) {
    float * F = s.result(0);
    float * R = s.result(1);
    s.importance(F);
    s.redundancy(R);

    const size_t stride = s.n_max_pad;
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        divide_by_maximum(F + h*stride, s.n_cand);
        divide_by_maximum(R + h*stride, s.n_cand);
    }
    s.team.barrier();
    s.remember(F, 0);

    const float lambda = s.par.lambda;
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        for (int j = 0; j < s.n_cand; ++j) {
            z[h*z_head + j] = lambda*F[h*stride + j] - (1.0f - lambda)*R[h*stride + j];
        }
    }
}
