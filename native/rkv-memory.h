// What a context takes on each device, also of one that was made without allocating (llama_model_params.no_alloc).

#pragma once

#include "ggml-backend.h"

#include <cstddef>

// Temporary memory that a backend's kernel for this GGML_OP_RKV node takes beside the tensors of the graph: the CPU's
// work buffer; elsewhere what the backend says of itself, if it has a
//   size_t ggml_backend_rkv_scratch_size(const ggml_tensor * node)
// under that name in ggml_backend_reg_get_proc_address(), else 0.
size_t rkv_kernel_memory(ggml_backend_t backend, const ggml_tensor * node, int n_threads);
