// The pass: score, select and gather, for all layers and for the sequences that are full, as one graph with a
// scheduler of its own, so that the decode graph stays allocated and is reused.

#include "rkv-cache.h"
#include "rkv-usage.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <numeric>

static constexpr size_t JOBS_PER_PASS   = 64; // bounds the temporary memory, with RKV_SCRATCH_MAX
static constexpr int    NODES_PER_LAYER = 8;

static size_t graph_size(size_t n_layer) { return n_layer*NODES_PER_LAYER*4 + 64; }

namespace {

ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    return t;
}

struct group_io {
    ggml_tensor * jobs = nullptr;
    std::vector<int32_t> job_data;
};

// what the pass moves, as views [unit, n_cells, heads or head elements, n_stream]
std::vector<ggml_tensor *> gathered(ggml_context * ctx, const rkv_cache::layer_t & l, bool v_trans) {
    const auto by_head = [&](ggml_tensor * t, int64_t n_embd_head) {
        return ggml_view_4d(ctx, t, n_embd_head, t->ne[1], l.n_head_kv, t->ne[2],
            t->nb[1], ggml_row_size(t->type, n_embd_head), t->nb[2], 0);
    };
    // a transposed V is [n_cells, n_embd_v_gqa] in memory; padding columns (TAG_V_CACHE_VARIABLE) need no move
    const auto transposed = [&](ggml_tensor * t, int64_t n_line, int64_t n_cells) {
        const size_t el = ggml_type_size(t->type);
        return ggml_view_4d(ctx, t, 1, n_cells, n_line, t->ne[2], el, el*n_cells, t->nb[2], 0);
    };
    std::vector<ggml_tensor *> views = { by_head(l.k, l.n_embd_k) };
    if (l.v) {
        views.push_back(v_trans ? transposed(l.v, (int64_t) l.n_embd_v*l.n_head_kv, l.v->ne[1]) : by_head(l.v, l.n_embd_v));
    }
    views.push_back(transposed(l.pos, l.n_head_kv, l.pos->ne[0]));
    if (l.aux) {
        views.push_back(l.aux);
    }
    return views;
}

} // namespace

// room for the tensors and the graph of a pass over all layers
ggml_context_ptr rkv_cache::pass_context() const {
    const size_t n_tensors = layers.size()*(2*NODES_PER_LAYER + 5) + ropes.size() + 4*groups.size() + 16;
    return ggml_context_ptr(ggml_init({ ggml_tensor_overhead()*n_tensors +
        ggml_graph_overhead_custom(graph_size(layers.size()), false), nullptr, true }));
}

ggml_backend_t rkv_cache::backend_of(const ggml_tensor * t) const {
    const auto buft = ggml_backend_buffer_get_type(t->buffer);
    for (ggml_backend_t backend : backends) {
        if (ggml_backend_supports_buft(backend, buft)) {
            return backend;
        }
    }
    return backends.back();
}

bool rkv_cache::init_backends() {
    if (!sched) {
        backend_cpu.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        if (!backend_cpu) {
            return rkv_set_error("failed to initialize the CPU backend for the compaction");
        }
        for (int i = 0; i < ggml_backend_sched_get_n_backends(lctx->get_sched()); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(lctx->get_sched(), i);
            const auto type = ggml_backend_dev_type(ggml_backend_get_device(backend));
            if (type != GGML_BACKEND_DEVICE_TYPE_CPU && type != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
                backends.push_back(backend);
            }
        }
        backends.push_back(backend_cpu.get());
        const size_t size = graph_size(layers.size());
        sched.reset(ggml_backend_sched_new(backends.data(), nullptr, backends.size(), size, false, false));
        generic = std::make_unique<rkv_generic>(backend_cpu.get());
    }
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_cpu.get()));
    auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set_n_threads) {
        set_n_threads(backend_cpu.get(), lctx->n_threads());
    }
    return true;
}

// The steps of a pass over one layer, in their order: positions, score, select, and a gather for all that moves.
std::vector<ggml_tensor *> rkv_cache::pass_nodes(ggml_context * ctx, const layer_t & l, const pass_inputs & in) const {
    const rkv_op_params op = l.op;
    ggml_tensor * pos   = ggml_rkv_positions(ctx, l.pos, in.new_pos, in.jobs, &op);
    ggml_tensor * score = ggml_rkv_score    (ctx, l.k, l.q, in.jobs, pos, l.aux, in.rope, &op);
    ggml_rkv_score_add_sinks(score, l.sinks);
    if (rkv_needs_values(&op)) {
        ggml_rkv_score_add_values(score, rkv_values_view(ctx, l.v, v_transposed(), l.n_embd_v, l.n_head_kv));
    }
    if (l.stats) {
        ggml_rkv_score_add_stats(score, l.stats, in.q_pos);
    }
    rkv_op_params select = op;
    select.window = recent(groups[l.group]);
    ggml_tensor * idx   = ggml_rkv_select   (ctx, score, in.jobs, groups[l.group].budget, &select);

    std::vector<ggml_tensor *> nodes = { pos, score, idx };
    for (ggml_tensor * view : gathered(ctx, l, v_transposed())) {
        nodes.push_back(ggml_rkv_compact(ctx, view, idx, in.jobs, &op));
    }
    return nodes;
}

rkv_generic_layer rkv_cache::generic_layer(const layer_t & l, uint32_t strm) const {
    return { l.k, l.q, l.pos, l.aux, rkv_needs_rope(params.policy) ? rope_table(l) : nullptr, l.op, recent(groups[l.group]), l.sinks,
        rkv_needs_values(&l.op) ? l.v : nullptr, v_transposed(), l.n_embd_v, l.stats,
        std::vector<int32_t>(streams[strm].ring.begin(), streams[strm].ring.end()) };
}

rkv_generic::views rkv_cache::generic_views(const layer_t & l) const {
    return [this, &l](ggml_context * ctx) { return gathered(ctx, l, v_transposed()); };
}

void rkv_cache::place(ggml_backend_sched_t sched, ggml_cgraph * gf) const {
    ggml_backend_sched_reset(sched);
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_RKV) {
            // score reads the cache that compact writes: both belong where the layer is
            const ggml_tensor * home = node->view_src ? node->view_src : node->src[0];
            while (home && !home->buffer) {
                home = home->src[0];
            }
            ggml_backend_sched_set_tensor_backend(sched, node, backend_of(home));
        }
    }
}

// Starts a graph whose nodes all work on cache tensors; it may still run when this returns. Inputs are set between
// allocation and computation.
bool rkv_cache::run(ggml_cgraph * gf, const std::map<ggml_tensor *, std::vector<int32_t>> & inputs,
        const std::map<ggml_tensor *, const std::vector<float> *> & tables) {
    if (ggml_graph_n_nodes(gf) == 0) { // all layers took the generic path
        return true;
    }
    place(sched.get(), gf);
    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        return rkv_set_error("failed to allocate memory for the compaction");
    }
    for (const auto & [t, data] : inputs) {
        if (t->buffer) {
            ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
        }
    }
    for (const auto & [t, data] : tables) {
        if (t->buffer) {
            ggml_backend_tensor_set(t, data->data(), 0, ggml_nbytes(t));
        }
    }
    touched = true;
    if (ggml_backend_sched_graph_compute_async(sched.get(), gf) != GGML_STATUS_SUCCESS) {
        ggml_backend_sched_synchronize(sched.get());
        return rkv_set_error("the compaction failed to compute");
    }
    return true;
}

// A device failed. Where rows may have moved, no layer's rows mean anything any more without the others'.
bool rkv_cache::give_up(const std::vector<uint32_t> & strms) {
    if (touched) {
        ggml_backend_sched_synchronize(sched.get());
        const std::string why = rkv_last_error();
        for (const uint32_t s : strms) {
            kv.v_cells[s].reset();
            reset_if_empty(s);
        }
        rkv_set_error("%s; what %zu sequences held is lost: read them again", why.c_str(), strms.size());
    }
    return false;
}

bool rkv_cache::compact(const std::vector<uint32_t> & strms) {
    const int64_t t0 = ggml_time_us();

    if (!why_not.empty() || !all_captured()) { // rkv_end_init() refuses such a context; one with a forced budget comes here
        return rkv_set_error("a KV budget is not supported here: %s", why_not.empty() ? "queries cannot be seen" : why_not.c_str());
    }
    bool ok = true;
    for (size_t i = 0; ok && i < strms.size(); i += n_jobs_max) {
        const std::vector<uint32_t> some(strms.begin() + i, strms.begin() + std::min(i + n_jobs_max, strms.size()));
        try {
            ok = compact_some(some);
        } catch (const std::exception & err) { // main memory is short
            ok = rkv_set_error("the compaction failed: %s", err.what());
        }
        ok = ok || give_up(some);
    }
    t_us += ggml_time_us() - t0;
    if (!ok) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, rkv_last_error());
    }
    return ok;
}

// What rkv_seq_set_scores() said goes where the policy reads it. Cells without a score are kept before all others.
void rkv_cache::write_given(const layer_t & l, uint32_t strm) const {
    const range_t r = range(l, strm);
    const auto & all = streams[strm].given;
    for (int32_t h = 0; h < l.n_head_kv; ++h) {
        const auto it = all.find({ (int32_t) l.il, h });
        std::vector<float> z(r.end - r.begin);
        for (size_t j = 0; j < z.size(); ++j) {
            z[j] = it == all.end() ? (float) j : j < it->second.size() ? it->second[j] : 1e30f + 1e25f*j;
        }
        ggml_backend_tensor_set(l.aux, z.data(), strm*l.aux->nb[3] + h*l.aux->nb[2] + r.begin*l.aux->nb[1], z.size()*sizeof(float));
    }
}

// The mean over all layers and heads of their scores, each head's with mean 0 and deviation 1, decides for all of them.
bool rkv_cache::pass_shared(const int32_t * job, const int32_t * new_pos) {
    const int32_t  n      = job[RKV_JOB_END] - job[RKV_JOB_BEGIN], pinned = job[RKV_JOB_PIN];
    const int32_t  n_cand = n - params.window, n_recent = recent(groups.front());
    const uint32_t strm   = job[RKV_JOB_STREAM];
    std::vector<double> mean(n_cand, 0.0);
    for (const auto & l : layers) {
        std::vector<float> z;
        if (!generic->score(backend_of(l.k), generic_layer(l, strm), job, new_pos, generic_views(l), z)) {
            return rkv_set_error("scoring layer %u failed on %s", l.il, ggml_backend_name(backend_of(l.k)));
        }
        for (int32_t h = 0; h < l.n_head_kv; ++h) {
            const float * zh = z.data() + (size_t) h*n_cand;
            double total = 0.0, sq = 0.0;
            for (int32_t j = pinned; j < n_cand; ++j) {
                total += zh[j];
            }
            const double middle = total/(n_cand - pinned);
            for (int32_t j = pinned; j < n_cand; ++j) {
                sq += (zh[j] - middle)*(zh[j] - middle);
            }
            const double dev = std::sqrt(sq/(n_cand - pinned));
            for (int32_t j = pinned; j < n_cand && dev > 0.0 && std::isfinite(dev); ++j) {
                mean[j] += (zh[j] - middle)/dev;
            }
        }
    }
    const int32_t n_top = job[RKV_JOB_KEEP] - n_recent - pinned;
    std::vector<int32_t> best(n - n_recent - pinned), rows;
    std::iota(best.begin(), best.end(), pinned);
    std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return mean[a] > mean[b]; });
    best.resize(n_top);
    for (int32_t j = 0; j < pinned; ++j) {
        best.push_back(j);
    }
    for (int32_t j = n - n_recent; j < n; ++j) {
        best.push_back(j);
    }
    std::sort(best.begin(), best.end());
    for (const int32_t j : best) {
        rows.push_back(job[RKV_JOB_BEGIN] + j);
    }
    touched = true;
    for (const auto & l : layers) {
        if (!generic->gather(backend_of(l.k), job, rows, generic_views(l))) {
            return rkv_set_error("the compaction of layer %u failed on %s", l.il, ggml_backend_name(backend_of(l.k)));
        }
    }
    return true;
}

// No sequence has holes, and each reaches beyond row n_budget_max, or keeps its first row where it is: so every group's rows
// move towards the front.
bool rkv_cache::compact_some(const std::vector<uint32_t> & strms) {
    const int64_t n_jobs = strms.size();
    touched = false;
    if (!init_backends()) {
        return false;
    }

    ggml_context_ptr ctx = pass_context();
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), graph_size(layers.size()), false);

    std::map<ggml_tensor *, std::vector<int32_t>> inputs;
    std::map<ggml_tensor *, const std::vector<float> *> tables;

    // true positions of the cells added since the last pass, by virtual row
    ggml_tensor * new_pos = new_input(ctx.get(), GGML_TYPE_I32, n_cells(), n_jobs);
    auto & new_pos_data = inputs[new_pos];
    new_pos_data.assign(n_cells()*n_jobs, 0);
    for (int64_t i = 0; i < n_jobs; ++i) {
        const auto & c = cells(strms[i]);
        for (uint32_t r = streams[strms[i]].old_end; r < c.used_max_p1(); ++r) {
            new_pos_data[i*n_cells() + r] = c.is_empty(r) ? 0 : c.pos_get(r);
        }
    }

    ggml_tensor * q_pos = params.policy == RKV_POLICY_TRIATTENTION ? new_input(ctx.get(), GGML_TYPE_I32, params.window, n_jobs) : nullptr;
    for (int64_t i = 0; q_pos && i < n_jobs; ++i) {
        const auto & ring = streams[strms[i]].ring;
        inputs[q_pos].insert(inputs[q_pos].end(), ring.begin(), ring.end());
    }

    // one jobs tensor per group
    std::vector<group_io> io(groups.size());
    for (const auto & l : layers) {
        group_io & g = io[l.group];
        if (g.jobs) {
            continue;
        }
        g.jobs = new_input(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, n_jobs);
        for (const uint32_t s : strms) {
            const range_t  r      = range(l, s);
            const uint32_t budget = groups[l.group].budget;
            const uint32_t early  = early_target(s);
            const uint32_t keep   = std::min(r.end - r.begin, early > 0 ? early : budget);
            const uint64_t slots  = window_slots(s);

            int32_t job[RKV_JOB_N] = {};
            job[RKV_JOB_STREAM]   = s;
            job[RKV_JOB_BEGIN]    = r.begin;
            job[RKV_JOB_OLD_END]  = r.old_end;
            job[RKV_JOB_END]      = r.end;
            job[RKV_JOB_KEEP]     = keep;
            job[RKV_JOB_DST]      = early > 0 ? r.begin : budget - keep;
            job[RKV_JOB_SHIFT]    = groups[l.group].off;
            job[RKV_JOB_QUERY_LO] = (int32_t) (uint32_t) slots;
            job[RKV_JOB_QUERY_HI] = (int32_t) (uint32_t) (slots >> 32);
            job[RKV_JOB_PIN]      = pin(s);
            g.job_data.insert(g.job_data.end(), job, job + RKV_JOB_N);
        }
        inputs[g.jobs] = g.job_data;
    }

    std::vector<ggml_tensor *> rope_inputs(ropes.size(), nullptr);
    double evicted = 0, heads = 0;
    for (const auto & l : layers) {
        const group_io & g = io[l.group];

        for (int64_t i = 0; i < n_jobs; ++i) {
            const int32_t * job = g.job_data.data() + i*RKV_JOB_N;
            evicted += (double) l.n_head_kv*(job[RKV_JOB_END] - job[RKV_JOB_BEGIN] - job[RKV_JOB_KEEP]);
            if (params.policy == RKV_POLICY_GIVEN) {
                write_given(l, strms[i]);
            }
            if (params.shared_heads) {
                if (&l == &layers.back() && !pass_shared(job, new_pos_data.data() + i*n_cells())) {
                    return false;
                }
                continue;
            }
            touched = touched || l.generic;
            if (l.generic && !generic->pass(backend_of(l.k), generic_layer(l, strms[i]), job, new_pos_data.data() + i*n_cells(), generic_views(l))) {
                return rkv_set_error("the compaction of layer %u failed on %s", l.il, ggml_backend_name(backend_of(l.k)));
            }
        }
        heads += l.n_head_kv;
        if (l.generic) {
            continue;
        }

        ggml_tensor * rope = nullptr;
        if (rkv_needs_rope(params.policy) && l.rope >= 0) {
            const auto * table = rope_table(l);
            if (!rope_inputs[l.rope]) {
                rope_inputs[l.rope] = new_input(ctx.get(), GGML_TYPE_F32, l.op.n_rot, table->size()/l.op.n_rot);
                tables[rope_inputs[l.rope]] = table;
            }
            rope = rope_inputs[l.rope];
        }
        for (ggml_tensor * node : pass_nodes(ctx.get(), l, { new_pos, g.jobs, rope, q_pos })) {
            ggml_build_forward_expand(gf, node);
        }
    }

    if (!run(gf, inputs, tables)) {
        return false;
    }
    n_evicted     += evicted/heads;
    n_compactions += n_jobs;

    // The cells' metadata is the same for all heads. A row past the pinned ones and before the window holds different
    // tokens in different heads; it gets a position that none of them exceeds, strictly increasing, below the window's.
    for (const uint32_t s : strms) {
        auto & c = kv.v_cells[s];
        const uint32_t first = c.used_min(), end = c.used_max_p1();
        const uint32_t n     = end - first;
        const uint32_t early = early_target(s);
        const uint32_t keep  = std::min(n, early > 0 ? early : n_budget_max);
        const uint32_t last  = early > 0 ? first + keep : n_budget_max; // where the kept rows end

        std::vector<llama_pos> pos(n);
        for (uint32_t i = 0; i < n; ++i) {
            pos[i] = c.pos_get(first + i);
        }
        const uint32_t  window   = std::min(params.window, n);
        const llama_pos in_full  = pos[n - window]; // from here on every head holds the same tokens
        std::vector<llama_pos> kept(pos.end() - keep, pos.end());
        if (keep < n) { // should the window go, the sequence ends where it did before the window
            for (uint32_t i = 0; i < keep - window; ++i) {
                kept[i] = i < pin(s) ? pos[i] : pos[n - window - 1] - (llama_pos) (keep - window - 1 - i);
            }
        }
        const bool lost = std::any_of(layers.begin(), layers.end(), [&](const layer_t & l) {
            return keep < n || groups[l.group].budget < range(l, s).end - range(l, s).begin;
        });

        c.reset();
        for (uint32_t i = 0; i < keep; ++i) {
            c.pos_set(last - keep + i, kept[i]);
            c.seq_add(last - keep + i, s);
        }
        streams[s].old_end = last;
        streams[s].passes += 1;
        streams[s].given.clear();
        if (lost) {
            streams[s].compacted = true;
            streams[s].exact     = in_full;
        }
    }
    ggml_backend_sched_synchronize(sched.get()); // the metadata above took about as long as a device does
    return true;
}

// A removal in what was never compacted leaves free rows before or between used ones: close up.
bool rkv_cache::close_holes(uint32_t strm) {
    bool ok = false;
    touched = false;
    try {
        ok = close_up(strm);
    } catch (const std::exception & err) { // main memory is short
        rkv_set_error("closing holes of the cache failed: %s", err.what());
    }
    return ok || give_up({ strm });
}

bool rkv_cache::close_up(uint32_t strm) {
    auto & c = kv.v_cells[strm];
    const uint32_t first = streams[strm].old_end > 0 ? c.used_min() : n_start;
    const uint32_t end   = used_end(strm);
    if (end - first == c.get_used()) {
        return true;
    }
    if (!init_backends()) {
        return false;
    }

    std::vector<uint32_t> used;
    uint32_t old_used = 0;
    for (uint32_t r = first; r < end; ++r) {
        if (!c.is_empty(r)) {
            used.push_back(r);
            old_used += r < streams[strm].old_end;
        }
    }

    ggml_context_ptr ctx = pass_context();
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), graph_size(layers.size()), false);

    std::map<ggml_tensor *, std::vector<int32_t>> inputs;
    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> io(groups.size()); // rows, jobs
    for (const auto & l : layers) {
        auto & [rows, jobs] = io[l.group];
        const uint32_t off = groups[l.group].off;
        if (!rows) {
            rows = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, n_cells(), 1, 1);
            jobs = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
            ggml_set_input(rows);
            ggml_set_input(jobs);
            auto & data = inputs[rows];
            for (const uint32_t r : used) {
                if (r >= off) {
                    data.push_back(r - off);
                }
            }
            auto & job = inputs[jobs];
            job.assign(RKV_JOB_N, 0);
            job[RKV_JOB_STREAM] = strm;
            job[RKV_JOB_END]    = end - off;
            job[RKV_JOB_KEEP]   = data.size();
            job[RKV_JOB_DST]    = std::max(first, off) - off;
            data.resize(n_cells(), 0);
        }
        if (l.generic) {
            touched = true;
            if (!generic->gather(backend_of(l.k), inputs[jobs].data(), inputs[rows], generic_views(l))) {
                return rkv_set_error("closing holes of layer %u failed on %s", l.il, ggml_backend_name(backend_of(l.k)));
            }
            continue;
        }
        for (ggml_tensor * view : gathered(ctx.get(), l, v_transposed())) {
            ggml_build_forward_expand(gf, ggml_rkv_compact(ctx.get(), view, rows, jobs, &l.op));
        }
    }
    if (!run(gf, inputs, {})) {
        return false;
    }

    std::vector<llama_pos> pos;
    for (const uint32_t r : used) {
        pos.push_back(c.pos_get(r));
    }
    c.reset();
    for (size_t i = 0; i < pos.size(); ++i) {
        c.pos_set(first + i, pos[i]);
        c.seq_add(first + i, strm);
    }
    streams[strm].old_end = old_used > 0 ? first + old_used : 0;
    ggml_backend_sched_synchronize(sched.get());
    return true;
}

// Its graph as compact_some() makes it, with as many sequences as a pass can have.
bool rkv_cache::pass_memory(llama_context * lctx, std::map<ggml_backend_buffer_type_t, size_t> & sizes) {
    attach(lctx);
    if (!init_backends()) {
        return false;
    }
    const int64_t n_jobs = n_jobs_max;
    ggml_context_ptr ctx = pass_context();
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), graph_size(layers.size()), false);

    ggml_tensor * new_pos = new_input(ctx.get(), GGML_TYPE_I32, n_cells(), n_jobs);
    std::vector<ggml_tensor *> jobs(groups.size()), rope(ropes.size());
    ggml_tensor * q_pos = new_input(ctx.get(), GGML_TYPE_I32, params.window, n_jobs);
    std::map<ggml_backend_t, size_t> own; // what kernels, and the generic path, take beside the graph
    for (const auto & l : layers) {
        ggml_backend_t backend = backend_of(l.k);
        if (l.generic) {
            own[backend] = RKV_GENERIC_TEMP;
            if (!rkv_generic::is_made_of_ops(l.op)) { // a copy of one sequence, and the kernel there
                ggml_tensor * one   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
                ggml_tensor * score = pass_nodes(ctx.get(), l, { new_pos, one, nullptr, q_pos })[1];
                size_t size = rkv_kernel_memory(backend_cpu.get(), score, lctx->n_threads());
                for (const ggml_tensor * t : { l.k, l.v, l.q, l.pos, l.stats, l.aux }) {
                    size += t ? ggml_nbytes(t)/n_stream : 0;
                }
                own[backend_cpu.get()] = std::max(own[backend_cpu.get()], size);
            }
            continue;
        }
        if (!jobs[l.group]) {
            jobs[l.group] = new_input(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, n_jobs);
        }
        const bool rotates = rkv_needs_rope(params.policy) && l.rope >= 0;
        if (rotates && !rope[l.rope]) {
            const auto * table = rope_table(l);
            rope[l.rope] = new_input(ctx.get(), GGML_TYPE_F32, l.op.n_rot, table->size()/l.op.n_rot);
        }
        for (ggml_tensor * node : pass_nodes(ctx.get(), l, { new_pos, jobs[l.group], rotates ? rope[l.rope] : nullptr, q_pos })) {
            ggml_build_forward_expand(gf, node);
            own[backend] = std::max(own[backend], rkv_kernel_memory(backend, node, lctx->n_threads()));
        }
    }
    std::vector<size_t> graph(backends.size(), 0);
    // not with the pass's own scheduler, which would take these sizes for memory that it has
    ggml_backend_sched_ptr measuring { ggml_backend_sched_new(backends.data(), nullptr, backends.size(),
        graph_size(layers.size()), false, false) };
    if (ggml_graph_n_nodes(gf) > 0) {
        place(measuring.get(), gf);
        ggml_backend_sched_reserve_size(measuring.get(), gf, graph.data());
    }
    for (size_t i = 0; i < backends.size(); ++i) {
        sizes[ggml_backend_sched_get_buffer_type(measuring.get(), backends[i])] += graph[i] + own[backends[i]];
    }
    return true;
}

bool rkv_cache::compact_now(llama_seq_id seq_id) {
    const int64_t s = stream_of(seq_id);
    if (s < 0) {
        return rkv_set_error("there is no sequence %d: the context has %u", seq_id, n_stream);
    }
    if (!lctx || cells(s).get_used() == 0) {
        return rkv_set_error("sequence %d is empty", seq_id);
    }
    streams[s].old_end = std::min(streams[s].old_end, used_end(s));
    if (!close_holes(s)) {
        return false;
    }
    const uint32_t early = early_target(s);
    if (early > 0 ? cells(s).get_used() <= early : used_end(s) <= n_budget_max) {
        return rkv_set_error("sequence %d holds %d cells, within the budget", seq_id, seq_used(seq_id));
    }
    return compact({ (uint32_t) s });
}

// Which devices run the pass themselves, and do the others know what the generic path is made of? How
// many sequences fit into one pass?
bool rkv_cache::check_devices() {
    size_t n_generic = 0;
    n_jobs_max = std::min<size_t>(JOBS_PER_PASS, n_stream);
    for (auto & l : layers) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(l.k->buffer));
        if (!dev) { // main memory
            dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        }
        ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*32, nullptr, true }) };
        ggml_tensor * jobs = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
        ggml_tensor * rope = rkv_needs_rope(params.policy) && l.rope >= 0 ?
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, l.op.n_rot, RKV_ROPE_LO + 1) : nullptr;
        ggml_tensor * new_pos = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_cells(), 1);
        ggml_tensor * q_pos = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, params.window, 1);
        const auto nodes = pass_nodes(ctx.get(), l, { new_pos, jobs, rope, q_pos });
        l.generic = params.shared_heads || !std::all_of(nodes.begin(), nodes.end(), [dev](const ggml_tensor * t) { return rkv_has_kernel(dev, t); });
        n_generic += l.generic;

        for (const ggml_tensor * node : nodes) {
            if (!l.generic && !node->view_src) { // Metal's score brings its scratch memory along
                const size_t size = ggml_backend_buft_get_alloc_size(ggml_backend_buffer_get_type(l.k->buffer), node);
                n_jobs_max = std::max<size_t>(1, std::min(n_jobs_max, RKV_SCRATCH_MAX/size));
            }
        }
        if (l.generic && !rkv_generic::check(dev, generic_views(l))) {
            return rkv_set_error("layer %u's cache is on %s, which can neither compact it nor move its rows: keep the cache in "
                "main memory (offload_kqv=false, --no-kv-offload)", l.il, ggml_backend_dev_name(dev));
        }
    }
    if (n_generic > 0 && !params.shared_heads) {
        const bool here = rkv_generic::is_made_of_ops(layers.front().op);
        LLAMA_LOG_INFO("%s: no compaction kernels for %zu of %zu layers: they are built from other ops%s\n", __func__, n_generic,
            layers.size(), here ? "" : ", and the CPU computes their scores");
    }
    return true;
}
