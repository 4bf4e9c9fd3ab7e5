// Memories made of several caches, of which one has the budget: what it refuses is refused before another has changed.

#pragma once

#include "llama.h"

class  llama_kv_cache;
class  llama_kv_cache_iswa;
class  llama_memory_hybrid;
class  llama_memory_hybrid_iswa;
struct llama_memory_i;

// the cache that holds full attention's keys, NULL where the memory has none or an unknown kind
llama_kv_cache * rkv_attention_cache(llama_memory_i * memory);

// true: the operation may go on in every part. Without a budget always.
template <typename M> bool rkv_may_rm   (const M & memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
template <typename M> bool rkv_may_cp   (const M & memory, llama_seq_id src, llama_seq_id dst, llama_pos & p0, llama_pos & p1);
template <typename M> bool rkv_may_keep (const M & memory, llama_seq_id seq_id);
template <typename M> bool rkv_may_shift(const M & memory);
