// The angles of a model's RoPE, so that a cached key's rotation can be undone.

#pragma once

#include <cstdint>
#include <vector>

struct rkv_rope {
    int32_t n_rot;
    int32_t n_ctx_orig;
    float   freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow; // as ggml_rope_ext takes them
    const float * freq_factors; // [n_rot/2] or NULL
};

// what RoPE multiplies the rotated share by (YaRN, arXiv 2309.00071, section 3.4)
float rkv_rope_mscale(float freq_scale, float ext_factor, float attn_factor);

// The table that rkv-ops.h describes, for positions below n_pos. An angle is linear in the position with every scaling
// that ggml has, so 256 + n_pos/256 rows are enough.
std::vector<float> rkv_rope_table(const rkv_rope & rope, uint32_t n_pos);
