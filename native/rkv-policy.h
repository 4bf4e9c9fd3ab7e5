// What is kept. Each policy is a file of its own in cpu/.

#pragma once

enum rkv_policy {
    RKV_POLICY_NONE      = 0, // stock llama.cpp: n_ctx cells, nothing evicted
    RKV_POLICY_RKV       = 1, // Z = lambda*I - (1 - lambda)*R             (arXiv 2505.24133)
    RKV_POLICY_SNAPKV    = 2, // Z = I                                     (arXiv 2404.14469)
    RKV_POLICY_STREAMING = 3, // Z = recency                               (arXiv 2309.17453)
    RKV_POLICY_LATEST    = 4, // Z = lambda*I/max(I) - (1 - lambda)*L      (docs/design.md)
    RKV_POLICY_COUNT,
};
