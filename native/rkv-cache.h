// The budget of one llama_kv_cache: how cells are laid out, when a sequence is compacted, and what is allowed on it
// afterwards. One object per cache; llama_kv_cache calls it from the places that patches/ marks.
//
// Layers whose budgets are equal form a group. All groups share one virtual row index, in which the kept cells end at
// n_budget(): a group with a smaller budget owns no rows at the front, and its row r is virtual row r + off.

#pragma once

#include "rkv.h"
#include "rkv-generic.h"
#include "rkv-init.h"
#include "rkv-ops.h"
#include "rkv-rope.h"

#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

class  llama_kv_cache;
class  llama_io_read_i;
class  llama_io_write_i;
class  llama_kv_cells;
struct llama_memory_i;
struct llama_context;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_ubatch;

class rkv_cache {
public:
    // Which layers have cells here, and whose cells a layer reads that has none of its own (-1: none's).
    using filter_cb = std::function<bool(int32_t il)>;
    using reuse_cb  = std::function<int32_t(int32_t il)>;

    // nullptr unless a budget is pending on this thread (rkv_begin_init)
    static std::unique_ptr<rkv_cache> create(llama_kv_cache & kv, uint32_t n_stream, const filter_cb & filter, const reuse_cb & reuse);
    ~rkv_cache();

    //
    // allocation, called from llama_kv_cache's constructor
    //

    uint32_t n_cells()           const { return n_budget_max + n_extra; } // virtual rows
    uint32_t n_cells(int32_t il) const { return groups[group_of(il)].budget + n_extra; }
    uint32_t offset (int32_t il) const { return groups[group_of(owner(il))].off; }

    void add_layer(ggml_context * ctx, uint32_t il, ggml_tensor * k, ggml_tensor * v);

    //
    // llama_memory_i
    //

    void attach(llama_context * lctx); // at the start of each decode
    void clear();

    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) const; // false: refused
    // Would the tokens before p0 that a window of attention needs still be there? (stock drops them as it goes)
    bool window_reaches(const llama_kv_cache & window, llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    bool seq_cp  (llama_seq_id src, llama_seq_id dst, llama_pos & p0, llama_pos & p1); // false: refused
    bool seq_keep(llama_seq_id seq_id); // false: refused
    void copy_stream(uint32_t src, uint32_t dst);
    bool refuse_shift() const; // always true

    // both throw std::runtime_error with rkv_last_error() set; seq_id -1: all sequences
    void state_write(llama_io_write_i & io, llama_seq_id seq_id);
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id); // what it does not replace stays as it was

    //
    // batches
    //

    bool make_room(const std::vector<llama_ubatch> & ubatches); // compacts what has to be; false: does not fit
    std::vector<uint32_t> find_rows(uint32_t strm, uint32_t n_tokens) const; // empty: does not fit
    uint32_t n_kv(uint32_t used_max_p1);

    //
    // introspection
    //

    rkv_stats stats() const;
    bool compact_now(llama_seq_id seq_id);
    bool close_holes(uint32_t strm); // after it the rows of a sequence are contiguous; false: failed to compute
    bool all_captured() const;
    bool all_unrotatable() const;
    bool all_values() const; // each layer has a V
    bool set_pin(llama_seq_id seq_id, uint32_t n);
    uint32_t pin(uint32_t strm) const { return streams[strm].pin >= 0 ? streams[strm].pin : params.pin; }
    bool check_devices(); // which layers take the generic path; false: a layer's device can run neither
    int32_t seq_used(llama_seq_id seq_id) const;
    int32_t seq_room(llama_seq_id seq_id) const;

    // adds the temporary memory of the largest pass; works without allocated tensors; false: rkv_set_error()
    bool pass_memory(llama_context * lctx, std::map<ggml_backend_buffer_type_t, size_t> & sizes);

    const rkv_params & get_params() const { return params; }

    struct layer_t {
        uint32_t il;
        uint32_t group;
        int32_t  n_head, n_head_kv; // query heads of all layers that read these cells
        int32_t  n_embd_k, n_embd_v; // of a head
        std::vector<int32_t> readers; // layers that read these cells, this one first
        ggml_tensor * k;
        ggml_tensor * v;     // NULL: a part of k (MLA)
        ggml_tensor * sinks; // F32 [n_head], or NULL
        ggml_tensor * q;   // F32 [n_embd_head_k*n_head, window + 1, n_stream], the last row takes what is not needed
        ggml_tensor * pos; // I32 [n_cells, n_head_kv, n_stream]
        ggml_tensor * aux; // F32 [n_aux, n_cells, n_head_kv, n_stream] or NULL
        ggml_tensor * stats; // F32 [n_stats, n_head, n_stream] or NULL
        rkv_op_params op;
        float    scale_mul = 1.0f; // attention scale beside the graph's kq_scale
        bool     unrotatable = true; // RoPE is the last thing that happens to its keys
        int32_t  rope = -1; // index into ropes
        bool     captured = false;
        bool     generic  = false; // its device has no kernels for the pass
    };

    struct group_t {
        uint32_t budget;
        uint32_t off;
        uint32_t layer; // index of one of its layers
    };

    struct stream_t {
        uint32_t  old_end = 0;      // virtual; cells before it were kept by a compaction
        llama_pos exact   = 0;      // from this position on each cell is the same token in every head
        bool      compacted = false;
        std::vector<llama_pos> ring; // position whose query a slot of the ring holds, -1 = none
        int64_t   pin     = -1;   // rkv_seq_pin(), -1 = params.pin
        uint32_t  passes  = 0;    // compactions since it was empty
        std::map<std::pair<int32_t, int32_t>, std::vector<float>> given; // rkv_seq_set_scores(), by layer and head
        mutable bool filled = false; // has held cells since the pin was set
    };

    struct range_t { uint32_t begin, old_end, end; }; // physical rows

    const layer_t * find_layer(int32_t il) const;
    layer_t       * find_layer(int32_t il);
    int32_t   owner(int32_t il) const; // the layer whose cells `il` reads, -1 = none
    void      set_rope(layer_t & layer, const ggml_tensor * k_cur, const ggml_tensor * k_rot); // from the graph
    void      refuse(const std::string & why); // the first reason is reported by rkv_end_init()
    const std::string & refusal() const { return why_not; }
    range_t   range(const layer_t & layer, uint32_t strm) const;
    uint64_t  window_slots(uint32_t strm) const;
    const std::vector<float> * rope_table(const layer_t & layer) const;
    int64_t   stream_of(llama_seq_id seq_id) const; // -1 on a bad id
    const llama_kv_cells & cells(uint32_t strm) const;
    bool      v_transposed() const;
    const llama_hparams & hparams() const;
    uint32_t  group_of(int32_t il) const { return layer_group[il]; }

    // tokens at a sequence's end that all heads of a group's layers keep; while rpc's target grows it is one for all layers
    uint32_t  recent(const group_t & group) const {
        return rkv_recent(params, params.policy == RKV_POLICY_RPC ? groups.back().budget : group.budget);
    }

    std::vector<group_t>  groups; // [0] is the widest
    std::vector<stream_t> streams;
    std::vector<layer_t>  layers;
    // how far the last state_read came: other parts of a memory are read after this one
    enum { read_not_reached, read_refused, read_changed } read = read_not_reached;

private:
    rkv_cache(llama_kv_cache & kv, uint32_t n_stream, const filter_cb & filter, const reuse_cb & reuse);

    bool compact(const std::vector<uint32_t> & strms);
    bool compact_some(const std::vector<uint32_t> & strms);
    bool run(ggml_cgraph * gf, const std::map<ggml_tensor *, std::vector<int32_t>> & inputs,
             const std::map<ggml_tensor *, const std::vector<float> *> & tables);
    struct pass_inputs { ggml_tensor * new_pos, * jobs, * rope, * q_pos; };
    void place(ggml_backend_sched_t sched, ggml_cgraph * gf) const; // each node where its layer's cache is
    std::vector<ggml_tensor *> pass_nodes(ggml_context * ctx, const layer_t & layer, const pass_inputs & in) const;
    bool init_backends();
    ggml_context_ptr pass_context() const;
    bool close_up(uint32_t strm);
    bool give_up(const std::vector<uint32_t> & strms); // after a failure; false
    bool pass_shared(const int32_t * job, const int32_t * new_pos); // one set of rows for all layers
    void write_given(const layer_t & layer, uint32_t strm) const;
    uint32_t early_target(uint32_t strm) const; // rpc: cells to keep while the budget is not reached, else 0
    uint32_t full_at(uint32_t strm) const;      // virtual row from which on a sequence is compacted
    rkv_generic_layer  generic_layer(const layer_t & layer, uint32_t strm) const;
    rkv_generic::views generic_views(const layer_t & layer) const;
    uint32_t used_end(uint32_t strm) const;
    void     reset_if_empty(uint32_t strm);

    struct span_t { ggml_tensor * t; size_t offset, size; bool positions; };
    std::vector<std::pair<std::string, std::string>> state_traits() const;
    std::vector<span_t> state_spans(uint32_t strm, uint32_t first, uint32_t old, uint32_t end) const;
    void write_stream(llama_io_write_i & io, uint32_t strm);
    void read_stream (llama_io_read_i  & io, uint32_t strm);
    ggml_backend_t backend_of(const ggml_tensor * t) const;

    llama_kv_cache & kv;
    llama_context  * lctx = nullptr;
    const llama_model & model;
    std::unique_ptr<llama_cparams> cparams; // the context's own, with the logical n_ctx_seq

    rkv_params params;
    std::vector<uint32_t> layer_budgets; // empty: uniform
    std::vector<uint32_t> layer_group;

    uint32_t n_stream;
    uint32_t n_budget_max;
    uint32_t n_start; // first row of a fresh sequence: the first that every group owns
    uint32_t n_extra; // rows behind the kept cells

    struct rope_t {
        rkv_rope rope;
        const ggml_tensor * factors;
        std::vector<int32_t> still; // pairs that do not turn (M-RoPE's fourth section)
        std::vector<float>   table;
    };
    std::vector<rope_t> ropes;

    std::map<int32_t, std::vector<int32_t>> readers; // by owner
    std::string why_not;

    ggml_backend_ptr       backend_cpu; // of our own: no abort callback may stop a pass half-way
    ggml_backend_sched_ptr sched;
    std::vector<ggml_backend_t> backends;
    std::unique_ptr<rkv_generic> generic;

    size_t   n_jobs_max = 1;  // of one pass
    mutable std::vector<std::pair<std::string, std::string>> traits; // of a state; empty: not known yet

    uint32_t n_kv_pad = 0;    // 0: not known yet
    bool     touched  = false; // a pass has begun to move rows

    uint64_t n_compactions = 0;
    uint64_t t_us          = 0;
    double   n_evicted     = 0;
};

//
// creation: the budget waits in the thread until llama_model::create_memory makes the cache
//

// throws std::runtime_error with the reason where a pending budget cannot be honoured
void rkv_check_model (const llama_model & model, int ctx_type, const llama_cparams & cparams);
void rkv_check_memory(llama_memory_i * memory); // after the cache was made; deletes what it refuses

// the last error of this thread; printf-like, returns false
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
bool rkv_set_error(const char * fmt, ...);
