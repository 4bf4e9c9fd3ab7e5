// A budget on its way from rkv_begin_init() to the cache that llama_init_from_model() makes on the same thread.

#pragma once

#include "rkv.h"
#include "rkv-ops.h"
#include "rkv-rope.h"

#include <cstdint>
#include <string>
#include <vector>

class  llama_io_read_i;
struct llama_context;
struct llama_cparams;
struct llama_model;
class  rkv_cache;

struct rkv_pending {
    rkv_params params;
    std::vector<uint32_t> layer_budgets;

    // set by rkv_check_model
    const llama_model   * model   = nullptr;
    const llama_cparams * cparams = nullptr;

    bool taken  = false; // a cache has it
    rkv_cache * cache = nullptr; // that one
    bool failed = false;
    bool forced = false; // by RKV_FORCE_BUDGET: where the model is known not to support it there is none, else the context fails
};

rkv_pending * rkv_pending_get(); // NULL where none is pending

// Tokens at the end of a sequence that a layer of this budget always keeps.
uint32_t rkv_recent(const rkv_params & params, uint32_t budget);

rkv_op_params rkv_policy_op(const rkv_params & params); // what they say about an op; the layer's share is 0

// the budget of a context's cache, NULL where there is none
rkv_cache * rkv_cache_of(const llama_context * ctx);

void rkv_forced_done(const char * why_not); // a pending budget of RKV_FORCE_BUDGET has its cache; or why it has none

[[noreturn]] void rkv_refuse(const std::string & why); // throws std::runtime_error

// called where llama_init_from_model catches an exception
void rkv_init_failed(const char * why);

// called from llama_context where a state is read: llama_memory_i::state_read, after which nothing is half restored
void rkv_state_read(llama_context & ctx, llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0);
void rkv_state_begin(llama_context & ctx); // before a state is written or read: copies that wait are made
void rkv_state_drop(llama_context & ctx, llama_seq_id seq_id = -1); // forget what was restored, on a context with a budget
void rkv_state_check_length(uint32_t n_bytes); // of a text: throws where a damaged one is empty or would take gigabytes
void rkv_state_failed(const char * why); // becomes rkv_last_error()
