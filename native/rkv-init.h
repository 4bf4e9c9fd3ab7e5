// A budget on its way from rkv_begin_init() to the cache that llama_init_from_model() makes on the same thread.

#pragma once

#include "rkv.h"
#include "rkv-rope.h"

#include <cstdint>
#include <string>
#include <vector>

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
};

rkv_pending * rkv_pending_get(); // NULL where none is pending

// the budget of a context's cache, NULL where there is none
rkv_cache * rkv_cache_of(const llama_context * ctx);

[[noreturn]] void rkv_refuse(const std::string & why); // throws std::runtime_error

// called where llama_init_from_model catches an exception
void rkv_init_failed(const char * why);
