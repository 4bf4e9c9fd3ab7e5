// SnapKV (arXiv 2404.14469): importance alone, R-KV with lambda = 1.

#include "rkv-scorer.h"

void rkv_policy_snapkv(rkv_scorer & s, float * z, size_t z_head) {
    float * I = s.result(0);
    s.importance(I);
    if (s.par.memory > 0.0f) {
        s.remember(I, 0);
    }

    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        for (int j = 0; j < s.n_cand; ++j) {
            z[h*z_head + j] = I[(size_t) h*s.n_max_pad + j];
        }
    }
}
