// The one table of cases that every backend is held to, against the CPU's results (native/cpu).

#pragma once

#include "rkv-ops.h"
#include "rkv-policy.h"

#include "ggml-backend.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct rkv_case_job {
    int stream, begin, old_end, end, keep, dst, shift;
    uint64_t slots; // of the query ring
};

struct rkv_case {
    std::string name; // unique
    int       policy = RKV_POLICY_RKV;
    ggml_type type_k = GGML_TYPE_F16, type_v = GGML_TYPE_F16;
    int n_embd_k = 64, n_embd_v = 64; // of a head; no V at all where n_embd_v is 0 (MLA)
    int n_head_kv = 2, n_group = 3;
    int n_cells = 160, n_stream = 3;
    int window = 8, pool = 7, pin = 4;
    float value_weight = 0.0f;
    int recent = 8; // kept at the end, at least window
    int n_sim = 1, n_aux = 1; // of `latest`; others have as many as they need
    int chunk = 10, layer = 5;
    uint32_t seed = 0;
    int n_rot = 0;
    int n_hadamard = 0, n_hadamard_v = 0;
    bool  neox = false, v_trans = false, reference = false;
    bool  nan_key = false; // one head of the first job holds a NaN
    bool  same_values = false; // in all cells
    float mscale = 1.0f, lambda = 0.1f, threshold = 0.5f, softcap = 0.0f, memory = 0.0f, value_share = 0.1f;
    std::vector<rkv_case_job> jobs;
};

const std::vector<rkv_case> & rkv_cases();
// a policy, or a memory, that only the CPU has to know: other backends know it or refuse it
bool rkv_case_is_optional(const rkv_case & c);
rkv_op_params rkv_case_params(const rkv_case & c);
rkv_op_params rkv_case_select(const rkv_case & c); // of SELECT

// inputs, as the tensors hold them; the same on every call
struct rkv_case_data {
    std::vector<uint8_t> k, v;    // [n_embd*n_head_kv, n_cells, n_stream]; V as [n_cells, n_embd*n_head_kv, n_stream] if transposed
    std::vector<float>   q;       // [n_embd_k*n_head, window + 1, n_stream]
    std::vector<int32_t> pos;     // [n_cells, n_head_kv, n_stream]
    std::vector<int32_t> new_pos; // [n_new, n_jobs]
    std::vector<int32_t> jobs;    // [RKV_JOB_N, n_jobs]
    std::vector<float>   aux;     // [n_aux, n_cells, n_head_kv, n_stream], empty where the policy stores none
    std::vector<float>   rope;    // [n_rot, ..], empty where it is not needed
    std::vector<float>   stats;   // triattention: [n_stats, n_head, n_stream]
    std::vector<int32_t> q_pos;   // and [window, n_jobs]
    int n_new = 0;
    int n_keep_max = 0;
};

rkv_case_data rkv_case_inputs(const rkv_case & c);

// what a pass left behind, in the same layouts
struct rkv_case_result {
    std::string error; // not empty: did not run
    std::vector<float>   score; // [n_cells, n_head_kv, n_jobs]; may be empty, then only its consequences are compared
    std::vector<int32_t> idx;   // [n_keep_max, n_head_kv, n_jobs]
    std::vector<uint8_t> k, v;
    std::vector<int32_t> pos;
    std::vector<float>   aux, stats;
};

struct rkv_case_tensors {
    ggml_tensor * k = nullptr, * v = nullptr, * q = nullptr, * pos = nullptr, * new_pos = nullptr, * jobs = nullptr,
                * aux = nullptr, * rope = nullptr, * stats = nullptr, * q_pos = nullptr; // from v on: may be NULL but pos, new_pos, jobs
    ggml_tensor * score = nullptr, * idx = nullptr; // set by the builder; score may stay NULL
};

template<typename T>
void rkv_case_get(const ggml_tensor * x, std::vector<T> & data) { // a tensor that is NULL leaves data alone
    if (x) {
        data.resize(ggml_nbytes(x)/sizeof(T));
        ggml_backend_tensor_get(x, data.data(), 0, ggml_nbytes(x));
    }
}

void rkv_case_set(const rkv_case_tensors & t, const rkv_case_data & d); // inputs; tensors that are NULL are left out

// the SCORE node, with all its sources; pos as it is after POSITIONS
ggml_tensor * rkv_case_score(ggml_context * ctx, const rkv_case & c, const rkv_case_tensors & t, ggml_tensor * pos);

// what moves: views [unit, n_cells, lines, n_stream]
std::vector<ggml_tensor *> rkv_case_moved(ggml_context * ctx, const rkv_case & c, const rkv_case_tensors & t);

// the pass as a graph; the default is made of the RKV nodes. ctx has room for the graph and 4096 tensors
using rkv_case_builder = std::function<void(ggml_context * ctx, ggml_cgraph * gf, const rkv_case & c, const rkv_case_data & d,
                                            rkv_case_tensors & t)>;
void rkv_case_build(ggml_context * ctx, ggml_cgraph * gf, const rkv_case & c, const rkv_case_data & d, rkv_case_tensors & t);

rkv_case_result rkv_case_run(ggml_backend_t backend, const rkv_case & c, const rkv_case_data & d,
                             const rkv_case_builder & build = rkv_case_build);

// "" or what differs. Kept sets are equal except where scores are within 1e-6 of each other; the bytes are those that the
// result's own indices ask for; positions equal, aux within 1e-5.
std::string rkv_case_compare(const rkv_case & c, const rkv_case_data & d, const rkv_case_result & want, const rkv_case_result & got);
