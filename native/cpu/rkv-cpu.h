// What ggml-cpu.c calls for GGML_OP_RKV.

#pragma once

#include "ggml.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void   ggml_compute_forward_rkv(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_rkv_work_size      (const struct ggml_tensor * dst, int n_tasks); // bytes

#ifdef __cplusplus
}
#endif
