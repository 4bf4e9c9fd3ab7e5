// Reasoning Path Compression (arXiv 2505.13866): what all heads of the layer attend to on average, mean-pooled; the prompt
// is pinned by the caller, and the target grows with the trace (rkv_params.growth).

#include "rkv-scorer.h"

void rkv_policy_rpc(rkv_scorer & s, float * z, size_t z_head) {
    s.layer_attention(z, z_head);
}
