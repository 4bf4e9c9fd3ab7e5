// StreamingLLM (arXiv 2309.17453): the most recent cells; its attention sinks are the pinned ones.

#include "rkv-scorer.h"

void rkv_policy_streaming(rkv_scorer & s, float * z, size_t z_head) {
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        for (int j = 0; j < s.n_cand; ++j) {
            z[h*z_head + j] = (float) j;
        }
    }
}
