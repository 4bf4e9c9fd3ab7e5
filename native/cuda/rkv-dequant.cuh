// Elements of a cached row, as float32.

#pragma once

#include "common.cuh"

#include <type_traits>

// Calls f with the type as a constant: a switch between two loads would make the second wait for the first. The rarer
// types share one variant, GGML_TYPE_COUNT, that looks at the type each time.
template <typename F>
static void rkv_with_type(int type, F && f) {
    switch (type) {
        case GGML_TYPE_F32:  f(std::integral_constant<int, GGML_TYPE_F32>());   break;
        case GGML_TYPE_F16:  f(std::integral_constant<int, GGML_TYPE_F16>());   break;
        case GGML_TYPE_BF16: f(std::integral_constant<int, GGML_TYPE_BF16>());  break;
        case GGML_TYPE_Q8_0: f(std::integral_constant<int, GGML_TYPE_Q8_0>());  break;
        case GGML_TYPE_Q4_0: f(std::integral_constant<int, GGML_TYPE_Q4_0>());  break;
        default:             f(std::integral_constant<int, GGML_TYPE_COUNT>()); break;
    }
}

// i is even; type_k matters only where type is GGML_TYPE_COUNT
template <int type>
static __device__ __forceinline__ float2 rkv_load2(int type_k, const char * row, int i) {
    // quants of a block of 32: byte b holds element b in its low nibble and b + 16 in its high one
    const int ib = i/32, in = i%32, b = in%16, shift = in < 16 ? 0 : 4;
    switch (type == GGML_TYPE_COUNT ? type_k : type) {
        case GGML_TYPE_F32:
            return *(const float2 *) (row + sizeof(float)*i);
        case GGML_TYPE_F16:
            return __half22float2(*(const half2 *) (row + sizeof(half)*i));
        case GGML_TYPE_BF16: {
            const uint32_t x = *(const uint32_t *) (row + sizeof(uint16_t)*i);
            return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
        }
        case GGML_TYPE_Q8_0: {
            const block_q8_0 & x = ((const block_q8_0 *) row)[ib];
            const float d = x.d;
            return make_float2(d*x.qs[in], d*x.qs[in + 1]);
        }
        case GGML_TYPE_Q4_0: {
            const block_q4_0 & x = ((const block_q4_0 *) row)[ib];
            const float d = x.d;
            return make_float2(d*(((x.qs[b] >> shift) & 15) - 8), d*(((x.qs[b + 1] >> shift) & 15) - 8));
        }
        case GGML_TYPE_Q4_1: {
            const block_q4_1 & x = ((const block_q4_1 *) row)[ib];
            const float2 dm = __half22float2(x.dm);
            return make_float2(dm.x*((x.qs[b] >> shift) & 15) + dm.y, dm.x*((x.qs[b + 1] >> shift) & 15) + dm.y);
        }
        case GGML_TYPE_Q5_0: {
            const block_q5_0 & x = ((const block_q5_0 *) row)[ib];
            const float    d  = x.d;
            const uint32_t qh = x.qh[0] | x.qh[1] << 8 | x.qh[2] << 16 | (uint32_t) x.qh[3] << 24;
            const int q0 = ((x.qs[b]     >> shift) & 15) | ((qh >> in       & 1) << 4);
            const int q1 = ((x.qs[b + 1] >> shift) & 15) | ((qh >> (in + 1) & 1) << 4);
            return make_float2(d*(q0 - 16), d*(q1 - 16));
        }
        case GGML_TYPE_Q5_1: {
            const block_q5_1 & x = ((const block_q5_1 *) row)[ib];
            const float2   dm = __half22float2(x.dm);
            const uint32_t qh = x.qh[0] | x.qh[1] << 8 | x.qh[2] << 16 | (uint32_t) x.qh[3] << 24;
            const int q0 = ((x.qs[b]     >> shift) & 15) | ((qh >> in       & 1) << 4);
            const int q1 = ((x.qs[b + 1] >> shift) & 15) | ((qh >> (in + 1) & 1) << 4);
            return make_float2(dm.x*q0 + dm.y, dm.x*q1 + dm.y);
        }
        case GGML_TYPE_IQ4_NL: {
            const block_iq4_nl & x = ((const block_iq4_nl *) row)[ib];
            const float d = x.d;
            return make_float2(d*kvalues_iq4nl[(x.qs[b] >> shift) & 15], d*kvalues_iq4nl[(x.qs[b + 1] >> shift) & 15]);
        }
        default:
            return make_float2(0.0f, 0.0f); // refused by supports_op
    }
}

// one element of a type without blocks
template <int type>
static __device__ __forceinline__ float rkv_load1(const char * x) {
    switch (type) {
        case GGML_TYPE_F32:  return *(const float *) x;
        case GGML_TYPE_F16:  return __half2float(*(const half *) x);
        case GGML_TYPE_BF16: return __uint_as_float((uint32_t) *(const uint16_t *) x << 16);
        default:             return 0.0f; // refused by supports_op
    }
}
