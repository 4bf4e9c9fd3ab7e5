// What rkv_seq_set_scores() said of each cell: an oracle's choice, for research.

#include "rkv-scorer.h"

void rkv_policy_given(rkv_scorer & s, float * z, size_t z_head) {
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        for (int j = 0; j < s.n_cand; ++j) {
            z[h*z_head + j] = s.aux[h*s.aux_head + (size_t) j*s.n_aux];
        }
    }
}
