// H2O (arXiv 2306.14048): heavy hitters, by the attention that a cell has been paid so far. Of all queries only those of
// the windows are seen, at each pass.

#include "rkv-scorer.h"

void rkv_policy_h2o(rkv_scorer & s, float * z, size_t z_head) {
    float * A = s.result(0);
    s.attention(A);

    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        for (int j = 0; j < s.n; ++j) {
            float & total = s.aux[h*s.aux_head + (size_t) j*s.n_aux];
            total = j < s.n_old ? total : 0.0f;
            if (j < s.n_cand) {
                total += s.n_query*A[(size_t) h*s.n_max_pad + j];
                z[h*z_head + j] = total;
            }
        }
    }
}
