// What ggml-metal calls for GGML_OP_RKV.

#pragma once

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// false for everything if the environment says RKV_METAL_KERNELS=0: the pass is then made of other ops
bool   rkv_metal_supports_op(const struct ggml_tensor * op, bool has_simdgroup_reduction);
void   rkv_metal_no_kernels (void); // they did not compile: from now on, false for everything
size_t rkv_metal_extra_size (const struct ggml_tensor * op); // bytes of scratch behind a node's data
void   rkv_metal_encode     (ggml_metal_library_t lib, ggml_metal_encoder_t enc, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
