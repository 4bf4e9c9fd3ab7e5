// ChunkKV (arXiv 2502.00299): groups of adjacent cells are kept or dropped together, by their mean importance. Groups are
// counted from the first cell that is not pinned; the last one to be kept is cut where the budget ends.

#include "rkv-scorer.h"

#include <algorithm>

void rkv_policy_chunkkv(rkv_scorer & s, float * z, size_t z_head) {
    float * I = s.result(0);
    s.importance(I);

    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        const float * Ih = I + (size_t) h*s.n_max_pad;
        std::fill_n(z + h*z_head, std::min(s.pin, s.n_cand), 0.0f);
        for (int first = s.pin; first < s.n_cand; first += s.par.chunk) {
            const int last = std::min(first + s.par.chunk, s.n_cand);
            double total = 0.0;
            for (int j = first; j < last; ++j) {
                total += Ih[j];
            }
            std::fill(z + h*z_head + first, z + h*z_head + last, (float) (total/(last - first)));
        }
    }
}
