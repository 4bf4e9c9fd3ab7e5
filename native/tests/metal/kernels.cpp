// rkv.metal as C++, the text that the Metal library is made of.

#include <metal_stdlib>

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wattributes"        // [[threadgroup_position_in_grid]]
#pragma GCC diagnostic ignored "-Wunused-function"   // common.h
#pragma GCC diagnostic ignored "-Wunused-variable"
#endif

#include "rkv.metal"

namespace {

uint3 group_of(const emulator_thread & t) { return { t.group[0], t.group[1], t.group[2] }; }

template<typename T> const T & args_of(const emulator_bindings & b) {
    static_assert(sizeof(T) <= sizeof(b.args), "arguments");
    return *(const T *) b.args;
}

const rkv_metal_score_args & score_args(const emulator_bindings & b) { return args_of<rkv_metal_score_args>(b); }

using B = const emulator_bindings &;
using T = const emulator_thread &;

struct { const char * name; emulator_kernel run; } const kernels[] = {
    { "kernel_rkv_logits", [](B b, T t) { kernel_rkv_logits(score_args(b), b.buffers[1], b.buffers[2], b.buffers[3],
        (float *) b.buffers[4], b.shared, group_of(t), t.lane, t.simdgroup); } },
    { "kernel_rkv_softmax", [](B b, T t) { kernel_rkv_softmax(score_args(b), b.buffers[1], (float *) b.buffers[2],
        b.shared, group_of(t), t.index, t.lane, t.simdgroup); } },
    { "kernel_rkv_mean", [](B b, T t) { kernel_rkv_mean(score_args(b), b.buffers[1], (float *) b.buffers[2], group_of(t), t.index); } },
    { "kernel_rkv_key_sum", [](B b, T t) { kernel_rkv_key_sum(score_args(b), b.buffers[1], b.buffers[2],
        (float *) b.buffers[3], b.shared, group_of(t), t.index, t.lane, t.simdgroup); } },
    { "kernel_rkv_copies", [](B b, T t) { kernel_rkv_copies(score_args(b), b.buffers[1], b.buffers[2],
        (float *) b.buffers[3], b.shared, group_of(t), t.index, t.lane, t.simdgroup); } },
    { "kernel_rkv_column_means", [](B b, T t) { kernel_rkv_column_means(score_args(b), b.buffers[1], (float *) b.buffers[2],
        b.shared, group_of(t), t.index); } },
    { "kernel_rkv_later", [](B b, T t) { kernel_rkv_later(score_args(b), b.buffers[1], b.buffers[2], b.buffers[3], b.buffers[4],
        (const float *) b.buffers[5], (float *) b.buffers[6], b.shared, group_of(t), t.lane, t.simdgroup); } },
    { "kernel_rkv_score", [](B b, T t) { kernel_rkv_score(score_args(b), b.buffers[1], (float *) b.buffers[2], b.buffers[3],
        b.shared, group_of(t), t.index, t.lane, t.simdgroup); } },
    { "kernel_rkv_values", [](B b, T t) { kernel_rkv_values(score_args(b), b.buffers[1], b.buffers[2], (float *) b.buffers[3],
        b.buffers[4], b.shared, group_of(t), t.index, t.lane, t.simdgroup); } },
    { "kernel_rkv_select", [](B b, T t) { kernel_rkv_select(args_of<rkv_metal_select_args>(b), b.buffers[1], b.buffers[2],
        b.buffers[3], (uint *) b.shared, group_of(t), t.index, t.lane, t.simdgroup); } },
    { "kernel_rkv_compact_4", [](B b, T t) { kernel_rkv_compact_4(args_of<rkv_metal_compact_args>(b), (uint32_t *) b.buffers[1],
        b.buffers[2], b.buffers[3], group_of(t), t.index); } },
    { "kernel_rkv_compact_2", [](B b, T t) { kernel_rkv_compact_2(args_of<rkv_metal_compact_args>(b), (uint16_t *) b.buffers[1],
        b.buffers[2], b.buffers[3], group_of(t), t.index); } },
    { "kernel_rkv_positions", [](B b, T t) { kernel_rkv_positions(args_of<rkv_metal_positions_args>(b), b.buffers[1],
        b.buffers[2], b.buffers[3], group_of(t), t.index); } },
};

} // namespace

emulator_kernel emulator_find_kernel(const std::string & name) {
    for (const auto & k : kernels) {
        if (name == k.name) {
            return k.run;
        }
    }
    return nullptr;
}
