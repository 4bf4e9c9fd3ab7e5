// LagKV (arXiv 2504.04704): keys and values that are unlike those of the next chunk: channels are normalised by their range
// there, and a cell scores by the deviation over its channels, as a softmax over its own chunk. What has no whole chunk
// behind it is kept before all others. Chunks are counted from the first cell that is not pinned, and shorter where there
// would be less than four.

#include "rkv-scorer.h"

#include <algorithm>
#include <cmath>

static void softmax(float * x, int n) {
    const float top = *std::max_element(x, x + n);
    double total = 0.0;
    for (int j = 0; j < n; ++j) {
        x[j] = std::exp(x[j] - top);
        total += x[j];
    }
    std::for_each(x, x + n, [total](float & v) { v = (float) (v/total); });
}

void rkv_policy_lagkv(rkv_scorer & s, float * z, size_t z_head) {
    float * SK = s.result(0);
    float * SV = s.result(1);
    const int n_chunk = std::clamp((s.n - s.pin)/4, 1, (int) s.par.chunk);
    s.lag_deviation(SK, n_chunk, false);
    s.lag_deviation(SV, n_chunk, true);

    const int n_lag = std::max(0, (s.n - s.pin)/n_chunk - 1), scored = s.pin + n_lag*n_chunk;
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        float * kh = SK + (size_t) h*s.n_max_pad, * vh = SV + (size_t) h*s.n_max_pad, * zh = z + h*z_head;
        for (int first = s.pin; first < scored; first += n_chunk) {
            softmax(kh + first, n_chunk);
            softmax(vh + first, n_chunk);
        }
        for (int j = 0; j < s.n_cand; ++j) {
            zh[j] = j < s.pin ? 0.0f : j < scored ? kh[j] + vh[j] : 2.0f + (float) j/s.n;
        }
    }
}
