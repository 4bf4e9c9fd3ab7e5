// VaSE (arXiv 2606.03928): the cells with the longest values are always kept, the rest is a sample without replacement,
// each cell as likely as it is important. The sample is that of the Gumbel-top-k trick: the highest log I + G, where the
// noise G depends on the seed, layer, head and true position alone.

#include "rkv-scorer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

static constexpr float LEAST = 1e-20f; // importance below it counts as this

static uint32_t mix(uint32_t x) { // MurmurHash3's last step
    x = (x ^ x >> 16)*0x85ebca6bu;
    x = (x ^ x >> 13)*0xc2b2ae35u;
    return x ^ x >> 16;
}

static float gumbel(uint32_t seed, uint32_t layer, uint32_t head, uint32_t pos) {
    uint32_t x = seed;
    for (const uint32_t word : { layer, head, pos }) {
        x = mix(x*0x9e3779b9u + word);
    }
    const float u = ((x >> 9) + 0.5f)*0x1p-23f; // in (0, 1), exact
    return -std::log(-std::log(u));
}

void rkv_policy_value_aware(rkv_scorer & s, float * z, size_t z_head) {
    float * I = s.result(0);
    float * N = s.result(1);
    s.importance(I);
    s.value_lengths(N);

    const int n_free = std::max(0, s.n_cand - s.pin);
    const int n_slot = std::clamp(s.n_keep - s.par.window - s.pin, 0, n_free);
    const int n_long = (int) (s.par.value_share*n_slot + 0.5f);
    std::vector<int> order(n_free);
    for (int h = s.team.ith; h < s.n_head_kv; h += s.team.nth) {
        const float * Ih = I + (size_t) h*s.n_max_pad, * Nh = N + (size_t) h*s.n_max_pad;
        float * zh = z + h*z_head;
        std::fill_n(zh, std::min(s.pin, s.n_cand), 0.0f);
        for (int j = s.pin; j < s.n_cand; ++j) {
            zh[j] = std::log(Ih[j] < LEAST ? LEAST : Ih[j]) + gumbel(s.par.seed, s.par.layer, h, s.pos[h*s.pos_head + j]);
        }
        std::iota(order.begin(), order.end(), s.pin);
        std::nth_element(order.begin(), order.begin() + n_long, order.end(), [Nh](int a, int b) {
            return Nh[a] > Nh[b] || (Nh[a] == Nh[b] && a < b);
        });
        for (int i = 0; i < n_long; ++i) {
            zh[order[i]] = RKV_KEPT_SCORE;
        }
    }
}
