#include "rkv-memory.h"
#include "rkv-cache.h"
#include "rkv-init.h"

#include "llama-hparams.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <string>
#include <typeinfo>

//
// kinds
//

// exactly this class: of one that is derived from it nothing is known
template <typename T> static T * as(llama_memory_i * memory) {
    return memory && typeid(*memory) == typeid(T) ? static_cast<T *>(memory) : nullptr;
}

llama_kv_cache * rkv_attention_cache(llama_memory_i * memory) {
    if (auto * kv = as<llama_kv_cache>(memory)) {
        return kv;
    }
    if (auto * iswa = as<llama_kv_cache_iswa>(memory)) {
        return iswa->get_base();
    }
    if (auto * hybrid = as<llama_memory_hybrid>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (auto * hybrid = as<llama_memory_hybrid_iswa>(memory)) {
        return hybrid->get_mem_attn()->get_base();
    }
    return nullptr;
}

void rkv_check_memory(llama_memory_i * memory) {
    const rkv_pending * pending = rkv_pending_get();
    if (!pending) {
        return;
    }
    const llama_kv_cache * kv = rkv_attention_cache(memory);
    if (kv && kv->rkv && pending->taken) {
        if (pending->forced) {
            rkv_forced_done(nullptr);
        }
        return;
    }
    const std::string why =
        !memory ? "the model keeps no KV cache" :
        as<llama_memory_recurrent>(memory) ? "the model is recurrent and has no KV cache" :
        as<llama_kv_cache_dsa>(memory) || as<llama_kv_cache_dsa_iswa>(memory) || as<llama_kv_cache_msa>(memory) ||
            as<llama_memory_hybrid_idx>(memory) ? "the model's cache has an indexer (sparse attention)" :
        "the model's kind of cache is unknown";
    if (pending->forced && !pending->taken) {
        rkv_forced_done(why.c_str());
        return;
    }
    delete memory;
    rkv_refuse(why);
}

//
// operations
//

static const llama_kv_cache * base_of(const llama_kv_cache_iswa      & m) { return m.get_base(); }
static const llama_kv_cache * base_of(const llama_memory_hybrid      & m) { return m.get_mem_attn(); }
static const llama_kv_cache * base_of(const llama_memory_hybrid_iswa & m) { return m.get_mem_attn()->get_base(); }

static const llama_kv_cache * window_of(const llama_kv_cache_iswa      & m) { return m.get_swa(); }
static const llama_kv_cache * window_of(const llama_memory_hybrid      &)   { return nullptr; }
static const llama_kv_cache * window_of(const llama_memory_hybrid_iswa & m) { return m.get_mem_attn()->get_swa(); }

template <typename M> bool rkv_may_rm(const M & memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const rkv_cache * rkv = base_of(memory)->rkv.get();
    if (!rkv) {
        return true;
    }
    const llama_kv_cache * window = window_of(memory);
    return rkv->seq_rm(seq_id, p0, p1) && (!window || rkv->window_reaches(*window, seq_id, p0, p1));
}

template <typename M> bool rkv_may_cp(const M & memory, llama_seq_id src, llama_seq_id dst, llama_pos & p0, llama_pos & p1) {
    rkv_cache * rkv = base_of(memory)->rkv.get();
    return !rkv || rkv->seq_cp(src, dst, p0, p1);
}

template <typename M> bool rkv_may_keep(const M & memory, llama_seq_id seq_id) {
    rkv_cache * rkv = base_of(memory)->rkv.get();
    if (!rkv) {
        return true;
    }
    if (!rkv->seq_keep(seq_id)) {
        return false;
    }
    if (auto * window = const_cast<llama_kv_cache *>(window_of(memory))) { // llama.cpp looks at one stream only
        for (uint32_t s = 0; s < window->get_n_stream(); ++s) {
            if ((llama_seq_id) s != seq_id) {
                window->seq_rm(s, -1, -1);
            }
        }
    }
    return true;
}

template <typename M> bool rkv_may_shift(const M & memory) {
    const rkv_cache * rkv = base_of(memory)->rkv.get();
    return !rkv || !rkv->refuse_shift();
}

#define RKV_MEMORY(M) \
    template bool rkv_may_rm<M>(const M &, llama_seq_id, llama_pos, llama_pos); \
    template bool rkv_may_cp<M>(const M &, llama_seq_id, llama_seq_id, llama_pos &, llama_pos &); \
    template bool rkv_may_keep<M>(const M &, llama_seq_id); \
    template bool rkv_may_shift<M>(const M &);

RKV_MEMORY(llama_kv_cache_iswa)
RKV_MEMORY(llama_memory_hybrid)
RKV_MEMORY(llama_memory_hybrid_iswa)
