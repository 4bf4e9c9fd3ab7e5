// GGML_OP_RKV for llama.cpp's own test-backend-ops, whose file includes this one (patches/, for the test build only):
// each step of the pass by itself, against the CPU. The table of whole passes is rkv-cases.cpp.

#pragma once

#include "rkv-cases.h"

struct test_rkv : public test_case {
    const rkv_case   c;
    const rkv_sub_op sub_op;
    rkv_case_data    d;
    rkv_case_tensors in;

    test_rkv(const rkv_case & c, rkv_sub_op sub_op) : c(c), sub_op(sub_op), d(rkv_case_inputs(c)) {}

    std::string op_desc(ggml_tensor *) override { return "RKV"; }

    std::string vars() override {
        static const char * const names[] = { "positions", "score", "select", "compact" };
        return std::string(names[sub_op]) + ",policy=" + std::to_string(c.policy) + ",type=" + ggml_type_name(c.type_k) +
            ",head=" + std::to_string(c.n_embd_k) + "x" + std::to_string(c.n_head_kv) + ",group=" + std::to_string(c.n_group) +
            ",cells=" + std::to_string(c.n_cells) + ",jobs=" + std::to_string(c.jobs.size());
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const rkv_op_params par = rkv_case_params(c);
        const int64_t n_jobs = c.jobs.size();
        in = {};
        in.jobs = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, RKV_JOB_N, n_jobs);
        switch (sub_op) {
            case RKV_SUB_OP_POSITIONS:
                in.pos     = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, c.n_cells, c.n_head_kv, c.n_stream);
                in.new_pos = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, d.n_new, n_jobs);
                return ggml_rkv_positions(ctx, in.pos, in.new_pos, in.jobs, &par);
            case RKV_SUB_OP_SCORE: {
                in.k   = ggml_new_tensor_3d(ctx, c.type_k, (int64_t) c.n_embd_k*c.n_head_kv, c.n_cells, c.n_stream);
                in.q   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, (int64_t) c.n_embd_k*c.n_head_kv*c.n_group, c.window + 1, c.n_stream);
                in.pos = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, c.n_cells, c.n_head_kv, c.n_stream);
                in.new_pos = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, d.n_new, n_jobs);
                if (!d.aux.empty()) {
                    in.aux = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.n_aux, c.n_cells, c.n_head_kv, c.n_stream);
                }
                if (!d.rope.empty()) {
                    in.rope = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_rot, d.rope.size()/c.n_rot);
                }
                if (rkv_needs_values(&par)) {
                    in.v = ggml_new_tensor_3d(ctx, c.type_v, (int64_t) c.n_embd_v*c.n_head_kv, c.n_cells, c.n_stream);
                }
                if (!d.stats.empty()) {
                    const int64_t n_head = c.n_head_kv*c.n_group;
                    in.stats = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d.stats.size()/n_head/c.n_stream, n_head, c.n_stream);
                    in.q_pos = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, c.window, n_jobs);
                }
                ggml_tensor * pos = ggml_rkv_positions(ctx, in.pos, in.new_pos, in.jobs, &par); // RoPE is undone by them
                ggml_tensor * z = rkv_case_score(ctx, c, in, pos);
                return mode == MODE_PERF ? z : // the window's entries mean nothing
                    ggml_cont(ctx, ggml_view_3d(ctx, z, c.n_cells - c.window, c.n_head_kv, n_jobs, z->nb[1], z->nb[2], 0));
            }
            case RKV_SUB_OP_SELECT: {
                const rkv_op_params select = rkv_case_select(c);
                in.score = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.n_cells, c.n_head_kv, n_jobs);
                return ggml_rkv_select(ctx, in.score, in.jobs, d.n_keep_max, &select);
            }
            default: {
                in.k   = ggml_new_tensor_3d(ctx, c.type_k, (int64_t) c.n_embd_k*c.n_head_kv, c.n_cells, c.n_stream);
                in.idx = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, d.n_keep_max, c.n_head_kv, n_jobs);
                ggml_tensor * rows = ggml_view_4d(ctx, in.k, c.n_embd_k, c.n_cells, c.n_head_kv, c.n_stream,
                    in.k->nb[1], ggml_row_size(c.type_k, c.n_embd_k), in.k->nb[2], 0);
                return ggml_rkv_compact(ctx, rows, in.idx, in.jobs, &par);
            }
        }
    }

    void initialize_tensors(ggml_context *) override {
        for (ggml_tensor * t : sentinels) {
            init_tensor_uniform(t);
        }
        rkv_case_set(in, d);
        if (in.score) { // ties, and what must lose to everything or win over everything
            std::default_random_engine rng(1);
            std::vector<float> z(ggml_nelements(in.score));
            for (size_t i = 0; i < z.size(); ++i) {
                const int r = rng()%64;
                z[i] = r == 0 ? NAN : r == 1 ? INFINITY : r == 2 ? -INFINITY : (float) (r%16) - 8.0f;
            }
            ggml_backend_tensor_set(in.score, z.data(), 0, ggml_nbytes(in.score));
        }
        if (in.idx) {
            std::vector<int32_t> rows(ggml_nelements(in.idx));
            for (size_t i = 0; i < rows.size(); ++i) {
                rows[i] = (int32_t) (i%d.n_keep_max*c.n_cells/d.n_keep_max);
            }
            ggml_backend_tensor_set(in.idx, rows.data(), 0, ggml_nbytes(in.idx));
        }
    }

    bool run_whole_graph() override { return sub_op == RKV_SUB_OP_SCORE; }
};

// every job full, so that each entry of a result is written
static rkv_case rkv_full_case(int policy, ggml_type type, int n_embd, int n_head_kv, int n_group, int n_cells, int n_jobs) {
    rkv_case c;
    c.policy    = policy;
    c.type_k    = c.type_v = type;
    c.n_embd_k  = c.n_embd_v = n_embd;
    c.n_head_kv = n_head_kv;
    c.n_group   = n_group;
    c.n_cells   = n_cells;
    c.n_stream  = n_jobs;
    c.n_rot     = rkv_needs_rope(policy) ? n_embd : 0;
    for (int i = 0; i < n_jobs; ++i) {
        c.jobs.push_back({ i, 0, n_cells/2, n_cells, n_cells - 40, 0, 0, (1ull << c.window) - 1 });
    }
    return c;
}

static void rkv_test_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const int n_embd : { 64, 96, 128, 256, 576 }) {
            for (const int policy : { RKV_POLICY_RKV, RKV_POLICY_SNAPKV, RKV_POLICY_LATEST }) {
                cases.emplace_back(new test_rkv(rkv_full_case(policy, type, n_embd, 2, 4, 200, 3), RKV_SUB_OP_SCORE));
            }
            for (int policy = RKV_POLICY_H2O; policy < RKV_POLICY_COUNT && (n_embd == 64 || n_embd == 128); ++policy) {
                cases.emplace_back(new test_rkv(rkv_full_case(policy, type, n_embd, 2, 4, 200, 3), RKV_SUB_OP_SCORE));
            }
            cases.emplace_back(new test_rkv(rkv_full_case(RKV_POLICY_RKV, type, n_embd, 2, 4, 200, 3), RKV_SUB_OP_COMPACT));
        }
    }
    for (const int n_cells : { 72, 200, 1300, 5000 }) {
        const rkv_case c = rkv_full_case(RKV_POLICY_RKV, GGML_TYPE_F16, 64, 3, 1, n_cells, 2);
        cases.emplace_back(new test_rkv(c, RKV_SUB_OP_SELECT));
        cases.emplace_back(new test_rkv(c, RKV_SUB_OP_POSITIONS));
    }
}

static void rkv_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) { // a layer of Llama-8B
    for (const int n_jobs : { 1, 16 }) {
        for (const int policy : { RKV_POLICY_RKV, RKV_POLICY_SNAPKV, RKV_POLICY_LATEST }) {
            cases.emplace_back(new test_rkv(rkv_full_case(policy, GGML_TYPE_F16, 128, 8, 4, 1152, n_jobs), RKV_SUB_OP_SCORE));
        }
        for (int policy = RKV_POLICY_H2O; policy <= RKV_POLICY_TRIATTENTION; ++policy) {
            cases.emplace_back(new test_rkv(rkv_full_case(policy, GGML_TYPE_F16, 128, 8, 4, 1152, n_jobs), RKV_SUB_OP_SCORE));
        }
        const rkv_case c = rkv_full_case(RKV_POLICY_RKV, GGML_TYPE_F16, 128, 8, 4, 1152, n_jobs);
        for (const rkv_sub_op op : { RKV_SUB_OP_POSITIONS, RKV_SUB_OP_SELECT, RKV_SUB_OP_COMPACT }) {
            cases.emplace_back(new test_rkv(c, op));
        }
    }
}
