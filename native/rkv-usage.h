// What a context takes on each device, also of one that was made without allocating (llama_model_params.no_alloc).

#pragma once

#include "ggml-backend.h"

#include <cstddef>

// Temporary memory that a backend's kernel for this GGML_OP_RKV node takes beside the tensors of the graph, at most: the
// CPU's work buffer; the scratch memory of a device.
size_t rkv_kernel_memory(ggml_backend_t backend, const ggml_tensor * node, int n_threads);
