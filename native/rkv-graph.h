// What a decode graph needs beyond llama.cpp's own inputs, when its cache has a budget.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct llama_ubatch;
class  llama_kv_cache_context;
class  llm_graph_input_attn_kv;

// The inputs of one group of layers (layers of the same budget).
struct rkv_group_inputs {
    ggml_tensor * k_idxs  = nullptr; // as llm_graph_input_attn_kv's, for this group's own rows
    ggml_tensor * v_idxs  = nullptr;
    ggml_tensor * kq_mask = nullptr; // the same mask without the columns that this group lacks
};

struct rkv_graph_inputs {
    ggml_tensor * q_idxs = nullptr;       // I64 [n_tokens]: row of the query rings that a token's query goes to
    std::vector<rkv_group_inputs> groups; // group 0 has llama.cpp's own inputs
};

// Each does nothing where the cache has no budget.
void rkv_build_inputs(ggml_context * ctx, const llama_ubatch & ubatch, llm_graph_input_attn_kv & inp);
void rkv_set_inputs  (const llama_ubatch * ubatch, llm_graph_input_attn_kv & inp);
rkv_group_inputs rkv_layer_inputs(const llm_graph_input_attn_kv & inp, int il);

// the queries of the last tokens go into the layer's ring
void rkv_capture(ggml_context * ctx, ggml_cgraph * gf, const llm_graph_input_attn_kv & inp, ggml_tensor * q_cur,
        float kq_scale, int il);
