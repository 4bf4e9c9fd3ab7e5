// A Metal device on the CPU: enough of one to run the kernels of native/metal/rkv.metal and the code that launches them.
//
// The threads of a threadgroup are fibers; one runs until it reaches a barrier or a simdgroup function, and goes on when
// all others that take part have got there. Which thread runs first is a parameter, and so are the order of threadgroups
// and of kernels between two memory barriers: a result that depends on it lacks a barrier.

#pragma once

#include "ggml-backend.h"

#include <string>

enum emulator_order { EMULATOR_FORWARD, EMULATOR_BACKWARD, EMULATOR_SHUFFLED, EMULATOR_ORDERS };

// a backend whose only op is GGML_OP_RKV, through rkv_metal_supports_op, rkv_metal_extra_size and rkv_metal_encode
ggml_backend_t emulator_backend_init();
void           emulator_set_order(emulator_order order);

// the first thing that no device would have stood for (a thread that misses a barrier, too much threadgroup memory,
// an unknown kernel, writing past a buffer); "" if there was none. Clears it.
std::string    emulator_take_error();
