#include "rkv-usage.h"
#include "rkv-cache.h"
#include "rkv-init.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-model.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cstdio>
#include <map>

// The CPU backend's work buffer for a graph. With GGML_BACKEND_DL it is in a library that libllama does not link to,
// and nothing asks for it: unknown there, some MiB.
static size_t cpu_work_size(const ggml_cgraph * gf, int n_threads) {
#ifdef GGML_BACKEND_DL
    GGML_UNUSED(gf);
    GGML_UNUSED(n_threads);
    return 0;
#else
    return ggml_graph_plan(gf, n_threads, nullptr).work_size;
#endif
}

size_t rkv_kernel_memory(ggml_backend_t backend, const ggml_tensor * node, int n_threads) {
    if (ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        ggml_context_ptr ctx { ggml_init({ ggml_graph_overhead_custom(1, false) + ggml_tensor_overhead(), nullptr, true }) };
        ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 1, false);
        ggml_graph_add_node(gf, const_cast<ggml_tensor *>(node));
        return cpu_work_size(gf, n_threads);
    }
    // Metal's is in the graph
    const auto * par = (const rkv_op_params *) node->op_params;
    if (par->sub_op != RKV_SUB_OP_SCORE || ggml_backend_buft_get_alloc_size(ggml_backend_get_default_buffer_type(backend), node) > ggml_nbytes(node)) {
        return 0;
    }
    const size_t head = rkv_score_scratch(par, node->ne[0], node->src[0]->ne[0]/par->n_head_kv);
    return std::max(head, std::min(RKV_SCRATCH_MAX, head*par->n_head_kv*(size_t) node->ne[2]));
}

// The CPU's work buffer for a prompt, where the whole graph runs there. Beside a GPU the CPU looks up embeddings only.
static size_t decode_work_size(llama_context * ctx) {
    const auto & cparams = ctx->get_cparams();
    const uint32_t n_seqs   = cparams.n_seq_max;
    const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);

    auto * memory = ctx->get_memory();
    llama_memory_context_ptr mctx = memory ? memory->init_full() : nullptr;
    ggml_cgraph * gf = ctx->graph_reserve(n_tokens, n_seqs, std::min(n_tokens, cparams.n_outputs_max), mctx.get(), true);
    return gf ? cpu_work_size(gf, std::max(cparams.n_threads, cparams.n_threads_batch)) : 0;
}

int32_t rkv_get_memory(llama_context * ctx, rkv_memory * dst, size_t n_max) {
    rkv_set_error("%s", "");
    if (!ctx) {
        rkv_set_error("no context");
        return -1;
    }
    llama_synchronize(ctx);
    std::map<ggml_backend_buffer_type_t, rkv_memory> found;
    bool on_cpu = true;
    for (const auto & [buft, mb] : llama_get_memory_breakdown(ctx)) {
        rkv_memory & m = found[buft];
        m.weights += mb.model;
        m.cache   += mb.context;
        m.compute += mb.compute;
        on_cpu = on_cpu && (ggml_backend_buft_is_host(buft) || mb.total() == 0 || !ggml_backend_buft_get_device(buft) ||
            ggml_backend_dev_type(ggml_backend_buft_get_device(buft)) == GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    rkv_memory & cpu = found[ggml_backend_cpu_buffer_type()];
    // graphs of the last decodes with outputs and without, which are kept to be reused
    const size_t n_nodes = ctx->graph_max_nodes(std::min(ctx->n_ctx(), ctx->n_ubatch()));
    cpu.compute += 2*(ggml_tensor_overhead()*n_nodes + ggml_graph_overhead_custom(n_nodes, false));
    // one row of logits for each sequence
    cpu.compute += (uint64_t) ctx->get_cparams().n_seq_max*ctx->get_model().vocab.n_tokens()*sizeof(float);
    if (on_cpu) {
        cpu.compute += decode_work_size(ctx);
    }
    if (rkv_cache * rkv = rkv_cache_of(ctx)) {
        std::map<ggml_backend_buffer_type_t, size_t> pass;
        if (!rkv->pass_memory(ctx, pass)) {
            return -1;
        }
        for (const auto & [buft, size] : pass) {
            found[buft].pass += size;
        }
    }

    size_t n = 0;
    for (auto & [buft, m] : found) {
        if (m.weights + m.cache + m.compute + m.pass == 0) {
            continue;
        }
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        snprintf(m.buffer, sizeof(m.buffer), "%s", ggml_backend_buft_name(buft));
        snprintf(m.device, sizeof(m.device), "%s", dev ? ggml_backend_dev_name(dev) : "CPU");
        // weights repacked for the CPU are in main memory too, though no other backend may read them
        m.host = ggml_backend_buft_is_host(buft) || !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
        if (dst && n < n_max) {
            dst[n] = m;
        }
        ++n;
    }
    return n;
}
