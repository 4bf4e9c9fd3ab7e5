// What a policy is written with: one sequence of one layer, all its KV heads, worked on by a team of threads.
//
// Every method below is collective: all threads call it with the same arguments, and it ends with a barrier.
// Results do not depend on the number of threads.

#pragma once

#include "rkv-ops.h"

#include <cstddef>
#include <cstdint>

struct ggml_threadpool;

struct rkv_team {
    int ith;
    int nth;
    ggml_threadpool * threadpool;

    void barrier() const;
};

// Keys are worked on in panels of 16 cells, [n_embd_head, 16]: a product of 4 vectors with a panel needs no
// horizontal sums, and the newest panel can be searched before the next older one is touched.
constexpr int RKV_PANEL = 16;

struct rkv_scorer {
    rkv_scorer(const rkv_op_params & par, rkv_team team) : par(par), team(team) {}

    const rkv_op_params & par;
    rkv_team team;

    int n         = 0; // cells
    int n_old     = 0; // the first n_old of them went through a compaction before
    int n_cand    = 0; // n - window: the candidates for eviction (pinned ones included)
    int n_head_kv = 0;
    int n_group   = 0; // query heads per KV head
    int n_embd    = 0; // n_embd_head_k
    int n_query   = 0; // queries in the window

    // keys: a head's cell j lies at k + h*k_head + j*k_cell
    const char * k = nullptr;
    size_t       k_head = 0, k_cell = 0;
    int          k_type = 0;
    const float * query[RKV_MAX_WINDOW] = {}; // [n_embd_head_k*n_head] each
    const float * sinks = nullptr; // [n_head], or none
    const int32_t * pos = nullptr; size_t pos_head = 0; // true positions; stride between heads in elements
    float * aux = nullptr;         size_t aux_head = 0; // n_aux floats per cell
    int     n_aux = 0;
    // values: element i of a head's cell j lies at v + h*v_head + j*v_cell + i*v_el
    const char * v = nullptr;
    size_t       v_head = 0, v_cell = 0, v_el = 0;
    int          v_type = 0, n_embd_v = 0;
    float * stats = nullptr;       size_t n_stats = 0; // [n_head][n_stats], see rkv_n_stats()
    int32_t query_pos[RKV_MAX_WINDOW] = {};
    int     pin = 0, n_keep = 0;
    const float * rope = nullptr;  int64_t rope_row = 0; // table, floats per row

    // scratch, sized by layout() for n_max cells
    float * panels = nullptr;   // [n_head_kv][n_panel][n_embd][16]
    float * queries = nullptr;  // [n_head_kv][n_embd][n_query*n_group, padded to 4]
    float * logits = nullptr;   // [n_head_kv][n_query][n_pad]
    float * norm = nullptr;     // [n_head_kv][n_pad]
    float * tmp[3] = {};   // [n_head_kv][n_pad]
    float * sum = nullptr;      // [n_head_kv][n_embd]
    int32_t * copy = nullptr;   // [n_head_kv][n_pad]
    float * row = nullptr;      // 4 rows of a key's or a value's length, for each thread
    int n_max_pad = 0;

    // A: [n_head_kv][n_pad], mean over the window's queries of their attention; written for j < n_cand, 0 beyond
    void attention(float * A);
    // I: the same, max-pooled
    void importance(float * I);
    // I = max(memory*stored, I), and stored
    void remember(float * I, int slot);
    // z: mean over all query heads of the layer of what each pays to the cells that are not pinned, mean-pooled
    void layer_attention(float * z, size_t z_head);
    // z: minus the cosine to the mean of the normalised keys
    void key_difference(float * z, size_t z_head);
    // S: [n_head_kv][n_pad], deviation over the channels, each normalised by its range in the next chunk of n_chunk cells
    void lag_deviation(float * S, int n_chunk, bool of_values);
    // N: [n_head_kv][n_pad], lengths of the values
    void value_lengths(float * N);
    // D: [n_head_kv][n_pad], distances of the values from their mean
    void value_distances(float * D);
    // triattention: the window's queries go into the statistics
    void gather_statistics();
    // z: what the mean query looks at from where it will be, z-scores, the largest of the group
    void trigonometric(float * z, size_t z_head);
    // R: [n_head_kv][n_pad], for all j < n
    void redundancy(float * R);
    // L: [n_head_kv][n_pad], mean of the par.n_sim highest RoPE-free cosines of key j to a later key
    void later_similarity(float * L);

    // two results that a policy may use as it likes, each [n_head_kv][n_pad]
    float * result(int i) const { return tmp[1 + i]; }

    int  pad_n() const { return (n + RKV_PANEL - 1) / RKV_PANEL * RKV_PANEL; }
    // sizes in floats; with a base the pointers above are set
    size_t layout(float * base, int n_max, int nth);

private:
    enum key_form { RAW, PLAIN, UNROTATED }; // as cached; without the cache's Hadamard rotation; without RoPE too
    void load_keys(key_form form);
    void key_row(int h, int j, float * dst) const;
    void value_row(int h, int j, float * dst) const;
    void normalise_keys();
    void sum_keys();
    void search_copies(int h, int panel);
    int  n_panel() const { return pad_n() / RKV_PANEL; }
    float * panel(int h, int b) const { return panels + ((size_t) h*(n_max_pad/RKV_PANEL) + b)*n_embd*RKV_PANEL; }
};

// z: [n_head_kv] rows at a stride of z_head floats; entries j < n_cand are compared by the selection
using rkv_policy_fn = void (*)(rkv_scorer & s, float * z, size_t z_head);

void rkv_policy_rkv(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_snapkv(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_streaming(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_latest(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_h2o(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_gkv(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_rpc(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_chunkkv(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_value_aware(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_keydiff(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_lagkv(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_triattention(rkv_scorer & s, float * z, size_t z_head);
void rkv_policy_given(rkv_scorer & s, float * z, size_t z_head);
