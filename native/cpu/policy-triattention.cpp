// TriAttention (arXiv 2604.04921): what the model's mean query will look at from several distances ahead, as a
// trigonometric series of the distance, plus lengths where queries spread; z-scores, the largest of the heads that share a
// KV head. The paper calibrates the means beforehand; here they are those of the windows that this sequence had so far.

#include "rkv-scorer.h"

void rkv_policy_triattention(rkv_scorer & s, float * z, size_t z_head) {
    s.gather_statistics();
    s.trigonometric(z, z_head);
}
