// KeyDiff (arXiv 2504.15364): keys that are unlike the mean of all keys, each normalised, are kept.

#include "rkv-scorer.h"

void rkv_policy_keydiff(rkv_scorer & s, float * z, size_t z_head) {
    s.key_difference(z, z_head);
}
