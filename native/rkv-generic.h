// The pass out of ops that every ggml backend knows, for devices without kernels for GGML_OP_RKV: one layer and one
// sequence at a time, each of them a graph of its own. Of policies that the other ops do not make, the CPU computes the
// scores, over a copy of what the layer holds (docs/backends.md).

#pragma once

#include "rkv-ops.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <vector>

// Temporary memory of a graph on the layer's device. A head is the least that is worked on at once: about 5 KiB per cell
// (8 copies of its keys in F32, 6 blocks of 32 rows of cosines), so very large budgets need more.
constexpr size_t RKV_GENERIC_TEMP = 64u << 20;

// RKV_GENERIC=1: for tests, also where there are kernels
bool rkv_generic_forced();

// Does the device run this GGML_OP_RKV node itself? An RPC device claims to run everything without asking its server,
// which may be another build: it never gets one. Only the CPU's kernel knows sinks and keys rotated at their end.
bool rkv_has_kernel(ggml_backend_dev_t dev, const ggml_tensor * node);

struct rkv_generic_layer {
    ggml_tensor * k;
    ggml_tensor * q;
    ggml_tensor * pos;
    ggml_tensor * aux;                // or NULL
    const std::vector<float> * rope;  // the table, or NULL
    rkv_op_params op;
    uint32_t      recent;             // tokens at the end that are kept whatever their score, at least op.window
    ggml_tensor * sinks = nullptr;    // F32 [n_head], or NULL
    ggml_tensor * v = nullptr;        // the cache, where a policy looks at values
    bool          v_trans = false;
    int32_t       n_embd_v = 0;
    ggml_tensor * stats = nullptr;    // triattention's, or NULL
    std::vector<int32_t> q_pos;       // [window], positions of the ring's queries (triattention)
};

// V as SCORE looks at it: a view [n_embd_v, n_cells, n_head_kv, n_stream]
ggml_tensor * rkv_values_view(ggml_context * ctx, ggml_tensor * v, bool v_trans, int64_t n_embd_v, int64_t n_head_kv);

// what a test wants to see
struct rkv_generic_result {
    std::vector<int32_t> rows;  // [n_keep, n_head_kv]
    std::vector<float>   score; // [n - window, n_head_kv]; empty where nothing had to be scored
    size_t temp = 0;            // bytes on the layer's device
};

class rkv_generic {
public:
    // makes the views of what moves, in the context of a graph
    using views = std::function<std::vector<ggml_tensor *>(ggml_context *)>;

    // what it computes with beside a layer's own backend; set_threads is the caller's
    explicit rkv_generic(ggml_backend_t backend_cpu) : cpu(backend_cpu) {}

    // Positions, score, select and compact of one job (RKV_JOB_N values); a step that the device has a kernel for is
    // left to it. new_pos: indexed by row + RKV_JOB_SHIFT.
    bool pass(ggml_backend_t home, const rkv_generic_layer & layer, const int32_t * job, const int32_t * new_pos,
            const views & data, rkv_generic_result * result = nullptr);

    // The scores of that pass alone, [n - window, n_head_kv]: positions and stored floats are updated, nothing moves.
    bool score(ggml_backend_t home, const rkv_generic_layer & layer, const int32_t * job, const int32_t * new_pos,
            const views & data, std::vector<float> & z);

    // compact alone: rows of every head alike
    bool gather(ggml_backend_t home, const int32_t * job, const std::vector<int32_t> & rows, const views & data);

    // Could the device that holds a layer run it? Only copies into the cache cannot go elsewhere.
    static bool check(ggml_backend_dev_t dev, const views & data);

    // Are the scores made of other ops here? Else the CPU computes them.
    static bool is_made_of_ops(const rkv_op_params & par);

    // Does the device multiply F32 as F32? Measured once; where it does not, products come in pieces.
    bool is_exact(ggml_backend_t home);

    // F32 products come in pieces that even TF32 and F16 units multiply exactly; for tests
    bool force_split = false;

private:
    bool work(ggml_backend_t home, const rkv_generic_layer & layer, const int32_t * job, const int32_t * new_pos,
            const views & data, rkv_generic_result * result, bool moves);
    bool score_on_cpu(const rkv_generic_layer & layer, const int32_t * job, std::vector<float> & z);
    bool run(ggml_backend_t home, ggml_cgraph * gf, const std::map<ggml_tensor *, std::vector<uint8_t>> & inputs,
            rkv_generic_result * result);

    ggml_backend_t cpu;
    std::map<ggml_backend_t, bool> exact;

    struct sched_t { ggml_backend_sched_ptr sched; size_t size = 0; };
    std::map<ggml_backend_t, sched_t> scheds;
};
