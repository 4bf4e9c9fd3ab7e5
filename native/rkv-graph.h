// What a decode graph needs beyond llama.cpp's own inputs, when its cache has a budget.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct llama_ubatch;

// The inputs of one group of layers (layers of the same budget).
struct rkv_group_inputs {
    ggml_tensor * k_idxs  = nullptr; // as llm_graph_input_attn_kv's, for this group's own rows
    ggml_tensor * v_idxs  = nullptr; // NULL where V is a part of K
    ggml_tensor * kq_mask = nullptr; // the same mask without the columns that this group lacks
};

struct rkv_graph_inputs {
    ggml_tensor * q_idxs = nullptr;       // I64 [n_tokens]: row of the query rings that a token's query goes to
    std::vector<rkv_group_inputs> groups; // group 0 has llama.cpp's own inputs
};

// What build_attn was called with.
struct rkv_attn {
    ggml_tensor * q;     // after the cache's rotation
    ggml_tensor * k;     // NULL where the layer reads another's cells
    ggml_tensor * kq_b;  // bias of the logits, or NULL
    ggml_tensor * sinks; // or NULL
    float scale;
    int   il;
};

// Each is for every input class of build_attn that has a KV cache, with the memory context of that input; without a
// budget they change nothing.
template <typename I>             void rkv_build_inputs(ggml_context * ctx, const llama_ubatch & ubatch, I & inp);
template <typename I, typename M> void rkv_set_inputs  (const llama_ubatch * ubatch, I & inp, const M * mctx);

// Stores the queries of the last tokens, and says where the layer's K and V go and what it may see.
template <typename I> rkv_group_inputs rkv_build_attn(ggml_context * ctx, ggml_cgraph * gf, const I & inp, const rkv_attn & attn);
