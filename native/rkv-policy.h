// What is kept. Each policy is a file of its own in cpu/.

#pragma once

enum rkv_policy {
    RKV_POLICY_NONE      = 0, // stock llama.cpp: n_ctx cells, nothing evicted
    RKV_POLICY_RKV       = 1, // Z = lambda*I - (1 - lambda)*R             (arXiv 2505.24133)
    RKV_POLICY_SNAPKV    = 2, // Z = I                                     (arXiv 2404.14469)
    RKV_POLICY_STREAMING = 3, // Z = recency                               (arXiv 2309.17453)
    RKV_POLICY_LATEST    = 4, // Z = lambda*I/max(I) - (1 - lambda)*L      (docs/design.md)
    RKV_POLICY_H2O         = 5,  // attention accumulated over all passes            (arXiv 2306.14048)
    RKV_POLICY_GKV         = 6,  // lambda*F - (1 - lambda)*R/max(R), F = max(memory*F, I/max(I)) (arXiv 2512.00504)
    RKV_POLICY_RPC         = 7,  // attention averaged over all heads of the layer   (arXiv 2505.13866)
    RKV_POLICY_CHUNKKV     = 8,  // I averaged over groups of adjacent cells         (arXiv 2502.00299)
    RKV_POLICY_VALUE_AWARE = 9,  // largest values, and a sample by I                (arXiv 2606.03928)
    RKV_POLICY_KEYDIFF     = 10, // keys unlike the mean key                         (arXiv 2504.15364)
    RKV_POLICY_LAGKV       = 11, // keys and values unlike the next chunk's          (arXiv 2504.04704)
    RKV_POLICY_TRIATTENTION = 12, // what the mean query will look at                (arXiv 2604.04921)
    RKV_POLICY_GIVEN       = 13, // what rkv_seq_set_scores() said; for research
    RKV_POLICY_COUNT,
};
