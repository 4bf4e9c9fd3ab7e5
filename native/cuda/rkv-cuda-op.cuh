#include "common.cuh"

void ggml_cuda_op_rkv(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool ggml_cuda_op_rkv_supported(int device, const ggml_tensor * op);
