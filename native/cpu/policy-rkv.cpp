// R-KV (arXiv 2505.24133, section 3): important and not redundant.

#include "rkv-scorer.h"

void rkv_policy_rkv(rkv_scorer & s, float * z, size_t z_head) {
    float * I = s.result(0);
    float * R = s.result(1);
    s.importance(I);
    if (s.par.memory > 0.0f) {
        s.remember(I, 0);
    }
    s.redundancy(R);

    const float  lambda = s.par.lambda;
    const size_t stride = s.n_max_pad;
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        for (int j = 0; j < s.n_cand; ++j) {
            z[h*z_head + j] = lambda*I[h*stride + j] - (1.0f - lambda)*R[h*stride + j];
        }
    }
}
