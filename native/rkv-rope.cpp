#include "rkv-rope.h"
#include "rkv-ops.h"

#include <algorithm>
#include <cmath>

float rkv_rope_mscale(float freq_scale, float ext_factor, float attn_factor) {
    return ext_factor == 0.0f ? attn_factor : attn_factor*(1.0f + 0.1f*std::log(1.0f/freq_scale));
}

std::vector<float> rkv_rope_table(const rkv_rope & rope, uint32_t n_pos) {
    const int half = rope.n_rot/2;

    float corr[2] = { 0.0f, 0.0f };
    ggml_rope_yarn_corr_dims(rope.n_rot, rope.n_ctx_orig, rope.freq_base, rope.beta_fast, rope.beta_slow, corr);

    // ggml multiplies a float by this float for each pair: its rounding is a frequency's, and compounds
    const double theta_scale = std::pow(rope.freq_base, -2.0f/rope.n_rot);

    std::vector<double> freq(half);
    for (int i = 0; i < half; ++i) {
        const double plain = std::pow(theta_scale, i) / (rope.freq_factors ? rope.freq_factors[i] : 1.0f);
        // share of the unscaled frequency (YaRN's "NTK-by-parts" ramp)
        const double ramp = std::clamp((i - corr[0]) / std::max(0.001f, corr[1] - corr[0]), 0.0f, 1.0f);
        const double mix  = rope.ext_factor == 0.0f ? 0.0 : (1.0 - ramp)*rope.ext_factor;
        freq[i] = plain*(rope.freq_scale*(1.0 - mix) + mix);
    }

    const uint32_t n_hi = n_pos/RKV_ROPE_LO + 1;
    std::vector<float> table((size_t) rope.n_rot*(RKV_ROPE_LO + n_hi));
    for (uint32_t r = 0; r < RKV_ROPE_LO + n_hi; ++r) {
        const double pos = r < RKV_ROPE_LO ? r : (double) (r - RKV_ROPE_LO)*RKV_ROPE_LO;
        float * row = table.data() + (size_t) r*rope.n_rot;
        for (int i = 0; i < half; ++i) {
            row[i]        = (float) std::cos(pos*freq[i]);
            row[half + i] = (float) std::sin(pos*freq[i]);
        }
    }
    return table;
}
