// Parameters, and which models they are for.

#include "rkv-cache.h"
#include "rkv-init.h"
#include "rkv-memory.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

// docs/design.md
static constexpr uint32_t LATEST_RECENT = 96;
static constexpr uint32_t LATEST_N_SIM  = 2;
static constexpr float    LATEST_VALUE_WEIGHT = 0.5f;

static thread_local std::string last_error;
static thread_local std::unique_ptr<rkv_pending> pending;

bool rkv_set_error(const char * fmt, ...) {
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    last_error = text;
    return false;
}

const char * rkv_last_error() { return last_error.c_str(); }

rkv_pending * rkv_pending_get() { return pending.get(); }

rkv_params rkv_default_params() {
    rkv_params p = {};
    p.policy    = RKV_POLICY_LATEST;
    p.budget    = 1024;
    p.buffer    = 256;
    p.window    = 8;
    p.pin       = 4;
    p.pool      = 7;
    p.lambda    = 0.1f;
    p.threshold = 0.5f;
    p.memory    = -1.0f;
    p.growth    = 4;
    p.value_share = 0.1f;
    p.value_weight = -1.0f;
    return p;
}

uint32_t rkv_recent(const rkv_params & p, uint32_t budget) {
    const uint32_t wanted = p.recent > 0 ? p.recent : p.policy == RKV_POLICY_LATEST ? LATEST_RECENT : 0;
    const uint32_t room   = budget - std::min(budget, p.pin + 1);
    return std::max(p.window, std::min({ wanted, budget/2, room }));
}

rkv_op_params rkv_policy_op(const rkv_params & p) {
    rkv_op_params op = {};
    op.policy      = p.policy;
    op.window      = p.window;
    op.pool        = p.pool;
    op.n_sim       = p.n_sim > 0 ? p.n_sim : p.policy == RKV_POLICY_LATEST ? LATEST_N_SIM : 1;
    op.flags       = p.reference ? RKV_FLAG_REFERENCE : 0;
    op.chunk       = p.chunk > 0 ? p.chunk : p.policy == RKV_POLICY_LAGKV ? 128 : 10;
    op.lambda      = p.lambda;
    op.threshold   = p.threshold;
    op.rope_mscale = 1.0f;
    op.memory      = p.memory >= 0.0f ? p.memory : p.policy == RKV_POLICY_GKV ? 0.8f : 0.0f;
    op.value_share = p.value_share;
    op.value_weight = p.policy != RKV_POLICY_LATEST ? 0.0f : p.value_weight >= 0.0f ? p.value_weight : LATEST_VALUE_WEIGHT;
    op.seed        = p.seed;
    return op;
}

static bool check_budget(const rkv_params & p, uint32_t budget, const char * whose) {
    const uint32_t least = p.window + p.pin + 1;
    if (budget < least) {
        return rkv_set_error("%s budget of %u cells leaves no room beside %u pinned cells and a window of %u: at least %u",
            whose, budget, p.pin, p.window, least);
    }
    if (budget > 1u << 24) {
        return rkv_set_error("%s budget of %u cells is too large", whose, budget);
    }
    return true;
}

bool rkv_params_check(const rkv_params * params) {
    last_error.clear();
    if (!params) {
        return rkv_set_error("no parameters");
    }
    const rkv_params & p = *params;
    if (p.policy < 0 || p.policy >= RKV_POLICY_COUNT) {
        return rkv_set_error("there is no policy %d", p.policy);
    }
    if (p.policy == RKV_POLICY_NONE) {
        return true;
    }
    if (p.window < 1 || p.window > RKV_MAX_WINDOW) {
        return rkv_set_error("window must be 1 to %d tokens, not %u", RKV_MAX_WINDOW, p.window);
    }
    if (p.buffer < 1 || p.buffer > 1u << 20) {
        return rkv_set_error("buffer must be 1 to %u tokens, not %u", 1u << 20, p.buffer);
    }
    if (p.pin > 1u << 24) {
        return rkv_set_error("pin must be at most %u cells, not %u", 1u << 24, p.pin);
    }
    if (p.n_batch_seq > 1u << 20) {
        return rkv_set_error("n_batch_seq must be at most %u tokens, not %u", 1u << 20, p.n_batch_seq);
    }
    if (p.pool < 1 || p.pool > 255 || p.pool % 2 == 0) {
        return rkv_set_error("pool must be an odd width of 1 to 255 cells, not %u", p.pool);
    }
    if (!(p.lambda >= 0.0f && p.lambda <= 1.0f)) {
        return rkv_set_error("lambda must be 0 to 1, not %g", p.lambda);
    }
    if (!(p.threshold >= -1.0f && p.threshold <= 1.0f)) {
        return rkv_set_error("threshold must be a cosine, -1 to 1, not %g", p.threshold);
    }
    if (p.n_sim > RKV_MAX_AUX) {
        return rkv_set_error("n_sim must be 1 to %d, or 0 for the policy's own, not %u", RKV_MAX_AUX, p.n_sim);
    }
    if (!(p.memory <= 1.0f)) {
        return rkv_set_error("memory must be 0 to 1, or negative for the policy's own, not %g", p.memory);
    }
    const bool remembers = p.policy == RKV_POLICY_RKV || p.policy == RKV_POLICY_SNAPKV || p.policy == RKV_POLICY_LATEST || p.policy == RKV_POLICY_GKV;
    if (p.memory > 0.0f && !remembers) {
        return rkv_set_error("the policy %s has no memory of importance", rkv_policy_name(p.policy));
    }
    if (p.chunk > RKV_MAX_CHUNK) {
        return rkv_set_error("chunk must be 1 to %d cells, or 0 for the policy's own, not %u", RKV_MAX_CHUNK, p.chunk);
    }
    if (p.recent > RKV_MAX_RECENT) {
        return rkv_set_error("recent must be 1 to %d tokens, or 0 for the policy's own, not %u", RKV_MAX_RECENT, p.recent);
    }
    if (!(p.value_weight <= 1.0f)) {
        return rkv_set_error("value_weight must be 0 to 1, or negative for the policy's own, not %g", p.value_weight);
    }
    if (p.value_weight > 0.0f && p.policy != RKV_POLICY_LATEST) {
        return rkv_set_error("the policy %s has no weight of values", rkv_policy_name(p.policy));
    }
    if (p.growth < 1 || p.growth > 1u << 20) {
        return rkv_set_error("growth must be 1 to %u, not %u", 1u << 20, p.growth);
    }
    if (!(p.value_share >= 0.0f && p.value_share <= 1.0f)) {
        return rkv_set_error("value_share must be 0 to 1, not %g", p.value_share);
    }
    if (p.shared_heads && p.layer_budgets) {
        return rkv_set_error("shared_heads keeps the same cells in all layers: their budgets must be equal");
    }
    if (p.reference && p.policy != RKV_POLICY_RKV) {
        return rkv_set_error("reference behaviour exists for the policy rkv only");
    }
    if (!p.layer_budgets) {
        return check_budget(p, p.budget, "a");
    }
    if (p.n_layer_budgets == 0) {
        return rkv_set_error("layer_budgets is empty");
    }
    for (uint32_t il = 0; il < p.n_layer_budgets; ++il) {
        const std::string whose = "layer " + std::to_string(il) + "'s";
        if (!check_budget(p, p.layer_budgets[il], whose.c_str())) {
            return false;
        }
    }
    return true;
}

//
// models
//

void rkv_refuse(const std::string & why) {
    throw std::runtime_error("a KV budget is not supported here: " + why);
}

// For tests of programs that know nothing of budgets: RKV_FORCE_BUDGET="512:128" gives each context one of 512 + 128 cells,
// where the model and the context can have one.
static void force_from_environment() {
    if (pending && pending->forced) {
        pending.reset(); // its context failed
    }
    const char * value = getenv("RKV_FORCE_BUDGET");
    if (pending || !value || !*value) {
        return;
    }
    auto forced = std::make_unique<rkv_pending>();
    forced->params = rkv_default_params();
    forced->params.policy = RKV_POLICY_RKV; // whatever is done to keys after RoPE
    forced->forced = true;
    char rest = 0;
    if (sscanf(value, "%u:%u%c", &forced->params.budget, &forced->params.buffer, &rest) != 2) {
        rkv_set_error("RKV_FORCE_BUDGET is %s, must be two numbers, budget:buffer", value);
        throw std::runtime_error(last_error);
    }
    if (!rkv_params_check(&forced->params)) {
        last_error = "RKV_FORCE_BUDGET: " + last_error;
        throw std::runtime_error(last_error);
    }
    pending = std::move(forced);
}

static void check_model(const llama_model & model, int ctx_type, const llama_cparams & cparams);

void rkv_check_model(const llama_model & model, int ctx_type, const llama_cparams & cparams) {
    force_from_environment();
    try {
        check_model(model, ctx_type, cparams);
    } catch (const std::exception & err) {
        if (!pending || !pending->forced) {
            throw;
        }
        LLAMA_LOG_WARN("%s: RKV_FORCE_BUDGET: %s\n", __func__, err.what());
        pending.reset();
    }
}

static void check_model(const llama_model & model, int ctx_type, const llama_cparams & cparams) {
    if (!pending || pending->taken) {
        return;
    }
    if (pending->failed) { // rkv_begin_init refused the parameters
        throw std::runtime_error(last_error);
    }
    const llama_hparams & hp = model.hparams;

    if (llm_arch_is_recurrent(model.arch))          { rkv_refuse("the model is recurrent and has no KV cache"); }
    if (model.arch == LLM_ARCH_DEEPSEEK4)           { rkv_refuse("the model attends to compressed keys (DeepSeek V4)"); }
    if (hp.use_alibi)                               { rkv_refuse("the model has ALiBi position biases"); }
    if (hp.ple_n_heads > 0)                         { rkv_refuse("the model reads earlier tokens from its cache (n-gram embeddings)"); }
    if (llama_model_has_encoder(&model))            { rkv_refuse("the model has an encoder"); }
    if (!cparams.causal_attn)                       { rkv_refuse("the attention is not causal"); }
    if (cparams.embeddings)                         { rkv_refuse("the context computes embeddings"); }
    if (ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT)     { rkv_refuse("the context is for a draft head (MTP)"); }
    if (cparams.ctx_other)                          { rkv_refuse("the context shares another context's cache"); }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR || model.split_mode() == LLAMA_SPLIT_MODE_ROW) {
        rkv_refuse("the model is split over devices by rows or tensors: use split mode layer");
    }
    if (cparams.kv_unified && cparams.n_seq_max > 1) {
        rkv_refuse("the sequences share one cache: set kv_unified to false");
    }

    if (!pending->layer_budgets.empty() && pending->layer_budgets.size() != hp.n_layer()) {
        rkv_refuse("there are " + std::to_string(pending->layer_budgets.size()) + " layer budgets for " +
            std::to_string(hp.n_layer()) + " layers");
    }
    if (pending->params.n_batch_seq == 0) {
        pending->params.n_batch_seq = cparams.n_batch;
    }
    pending->model   = &model;
    pending->cparams = &cparams;
}

void rkv_forced_done(const char * why_not) {
    if (why_not) {
        LLAMA_LOG_WARN("%s: RKV_FORCE_BUDGET: %s\n", __func__, why_not);
    } else {
        LLAMA_LOG_WARN("%s: RKV_FORCE_BUDGET: %u + %u cells\n", __func__, pending->params.budget, pending->params.buffer);
        if (!pending->cache->check_devices()) {
            pending.reset();
            throw std::runtime_error(last_error);
        }
    }
    pending.reset();
}

rkv_cache * rkv_cache_of(const llama_context * ctx) {
    if (!ctx) {
        return nullptr;
    }
    const llama_kv_cache * kv = rkv_attention_cache(ctx->get_memory());
    return kv ? kv->rkv.get() : nullptr;
}

//
// creation
//

void rkv_begin_init(const rkv_params * params) {
    last_error.clear();
    pending = std::make_unique<rkv_pending>();
    if (!rkv_params_check(params)) {
        pending->failed = true;
        return;
    }
    pending->params = *params;
    if (params->layer_budgets) {
        pending->layer_budgets.assign(params->layer_budgets, params->layer_budgets + params->n_layer_budgets);
    }
    if (params->policy == RKV_POLICY_NONE) {
        pending.reset();
    }
}

bool rkv_end_init() {
    if (!pending) {
        return true; // policy none
    }
    const auto done = std::move(pending);
    if (done->failed) {
        return false;
    }
    if (!last_error.empty()) {
        return false;
    }
    if (!done->taken || !done->cache) {
        return rkv_set_error("no context was created");
    }
    if (!done->cache->refusal().empty()) {
        return rkv_set_error("a KV budget is not supported here: %s", done->cache->refusal().c_str());
    }
    if (!done->cache->all_captured()) {
        return rkv_set_error("a KV budget is not supported here: the model's attention does not pass through the one place "
            "where queries can be seen");
    }
    const int32_t policy = done->params.policy;
    if (rkv_needs_rope(policy) && !done->cache->all_unrotatable()) {
        return rkv_set_error("the policy %s is not supported here: the model changes its keys after RoPE, which cannot be undone; "
            "rkv is (--kv-policy rkv)", rkv_policy_name(policy));
    }
    if (rkv_is_of_values(policy) && !done->cache->all_values()) {
        return rkv_set_error("the policy %s is not supported here: the model caches no values of their own (MLA)", rkv_policy_name(policy));
    }
    return done->cache->check_devices();
}

llama_context * rkv_init_from_model(llama_model * model, llama_context_params cparams, const rkv_params * params) {
    if (!rkv_params_check(params)) {
        return nullptr;
    }
    rkv_begin_init(params);
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (!rkv_end_init() && ctx) {
        llama_free(ctx);
        ctx = nullptr;
    }
    if (!ctx && last_error.empty()) {
        rkv_set_error("llama.cpp could not create the context: see its log");
    }
    return ctx;
}

// Called where llama_init_from_model catches an exception.
void rkv_init_failed(const char * why) {
    if (pending) {
        rkv_set_error("%s", why);
    }
}
