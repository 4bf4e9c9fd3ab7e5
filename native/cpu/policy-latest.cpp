// Keep the latest copy of what repeats: keys are compared without their rotation (docs/design.md, "latest"). Cells whose
// values are far from the mean value count more.

#include "rkv-scorer.h"

#include <algorithm>
#include <cmath>

// x as shares of a logistic distribution with their mean and deviation
static void logistic(float * x, int n) {
    double total = 0.0, sq = 0.0;
    for (int j = 0; j < n; ++j) {
        total += x[j];
    }
    const double mean = total/n;
    for (int j = 0; j < n; ++j) {
        sq += (x[j] - mean)*(x[j] - mean);
    }
    const double scale = RKV_LOGISTIC_SCALE/std::sqrt(sq/n + RKV_LEAST_VARIANCE);
    for (int j = 0; j < n; ++j) {
        x[j] = (float) (1.0/(1.0 + std::exp(-scale*(x[j] - mean))));
    }
}

void rkv_policy_latest(rkv_scorer & s, float * z, size_t z_head) {
    float * I = s.result(0);
    float * L = s.result(1);
    s.importance(I);
    if (s.par.memory > 0.0f) {
        s.remember(I, s.par.n_sim);
    }
    s.later_similarity(L);

    const float  lambda = s.par.lambda;
    const size_t stride = s.n_max_pad;
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        float *       zh   = z + h*z_head;
        const float * Ih   = I + h*stride;
        const float   peak = *std::max_element(Ih, Ih + s.n_cand);
        const float   unit = peak > 0.0f ? 1.0f/peak : 0.0f;
        for (int j = 0; j < s.n_cand; ++j) {
            zh[j] = lambda*Ih[j]*unit - (1.0f - lambda)*L[h*stride + j];
        }
    }
    if (s.par.value_weight <= 0.0f) {
        return;
    }
    float * D = L;
    s.team.barrier();
    s.value_distances(D);
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        float * zh = z + h*z_head, * Dh = D + h*stride;
        logistic(zh, s.n_cand);
        logistic(Dh, s.n_cand);
        for (int j = 0; j < s.n_cand; ++j) {
            zh[j] += s.par.value_weight*Dh[j];
        }
    }
}
