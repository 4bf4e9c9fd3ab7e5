// What kernels see of the emulated device (emulator.h). No ggml headers: common.h of the kernels repeats parts of them.

#pragma once

#include <cstdint>
#include <string>

void     emulator_threadgroup_barrier();
void     emulator_simdgroup_barrier();
float    emulator_simd_sum(float x);
uint32_t emulator_simd_sum_uint(uint32_t x);
float    emulator_simd_max(float x);
uint32_t emulator_simd_prefix_exclusive_sum(uint32_t x);
float    emulator_half_to_float(uint16_t bits);

//
// the kernels, compiled as C++ (kernels.cpp)
//

struct emulator_thread {
    uint32_t group[3];
    uint16_t index, lane, simdgroup;
};

struct emulator_bindings {
    alignas(16) uint8_t args[512];
    char *  buffers[12];
    float * shared;
};

using emulator_kernel = void (*)(const emulator_bindings & b, const emulator_thread & t);

emulator_kernel emulator_find_kernel(const std::string & name); // NULL if there is none
