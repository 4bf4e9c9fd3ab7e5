// Keep the latest copy of what repeats: keys are compared without their rotation (docs/design.md, "latest").

#include "rkv-scorer.h"

#include <algorithm>

void rkv_policy_latest(rkv_scorer & s, float * z, size_t z_head) {
    float * I = s.result(0);
    float * L = s.result(1);
    s.importance(I);
    if (s.par.memory > 0.0f) {
        s.remember(I, s.par.n_sim);
    }
    s.later_similarity(L);

    const float  lambda = s.par.lambda;
    const size_t stride = s.n_max_pad;
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        const float * Ih   = I + h*stride;
        const float   peak = *std::max_element(Ih, Ih + s.n_cand);
        const float   unit = peak > 0.0f ? 1.0f/peak : 0.0f;
        for (int j = 0; j < s.n_cand; ++j) {
            z[h*z_head + j] = lambda*Ih[j]*unit - (1.0f - lambda)*L[h*stride + j];
        }
    }
}
