// The steps of a compaction as ggml ops, on the CPU backend: gathering for every cache type and layout, positions,
// selection, and that the number of threads does not matter.

#include "rkv-ops.h"
#include "rkv-policy.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

static int n_failed = 0;
static int n_checks = 0;

#define CHECK(cond, ...) do { ++n_checks; if (!(cond)) { ++n_failed; printf("%s:%d: %s: ", __FILE__, __LINE__, #cond); printf(__VA_ARGS__); printf("\n"); } } while (0)

static std::mt19937 rng(7);

static std::vector<float> random_floats(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (auto & v : x) {
        v = normal(rng);
    }
    return x;
}

struct bench {
    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*64 + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_backend_buffer_ptr buf;
    ggml_cgraph * gf = ggml_new_graph(ctx.get());

    explicit bench(int n_threads) {
        auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
        ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))(backend.get(), n_threads);
    }
    void alloc() {
        buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
        ggml_backend_buffer_clear(buf.get(), 0xa5); // unwritten outputs must not pass for zeros
    }
    bool run() { return ggml_backend_graph_compute(backend.get(), gf) == GGML_STATUS_SUCCESS; }
};

static std::vector<int32_t> random_rows(int n, int n_keep) {
    std::vector<int32_t> rows(n);
    for (int i = 0; i < n; ++i) {
        rows[i] = i;
    }
    std::shuffle(rows.begin(), rows.end(), rng);
    rows.resize(n_keep);
    std::sort(rows.begin(), rows.end());
    return rows;
}

// K rows, V rows and a transposed V: after the op row dst + r of each head holds what row idx[r] held
static void test_compact(ggml_type type, bool transposed, int n_threads) {
    const int n_embd = 64, n_head = 3, n_cells = 96, n_stream = 3, n = 90, n_keep = 40, dst_row = 2, strm = 1;
    bench b(n_threads);

    ggml_tensor * t = ggml_new_tensor_3d(b.ctx.get(), type, n_embd*n_head, n_cells, n_stream);
    const size_t el = ggml_type_size(type);
    ggml_tensor * view = transposed ?
        ggml_view_4d(b.ctx.get(), t, 1, n_cells, n_embd*n_head, n_stream, el, el*n_cells, t->nb[2], 0) :
        ggml_view_4d(b.ctx.get(), t, n_embd, n_cells, n_head, n_stream, t->nb[1], ggml_row_size(type, n_embd), t->nb[2], 0);
    ggml_tensor * idx  = ggml_new_tensor_3d(b.ctx.get(), GGML_TYPE_I32, n_keep, n_head, 1);
    ggml_tensor * jobs = ggml_new_tensor_2d(b.ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
    rkv_op_params par = {};
    par.n_head_kv = n_head;
    ggml_build_forward_expand(b.gf, ggml_rkv_compact(b.ctx.get(), view, idx, jobs, &par));
    b.alloc();

    std::vector<uint8_t> before(ggml_nbytes(t)), after(before.size());
    for (auto & x : before) {
        x = rng();
    }
    ggml_backend_tensor_set(t, before.data(), 0, before.size());

    std::vector<int32_t> rows;
    for (int h = 0; h < n_head; ++h) {
        auto r = random_rows(n - dst_row, n_keep);
        for (auto & x : r) {
            x += dst_row; // rows move towards the front only
        }
        rows.insert(rows.end(), r.begin(), r.end());
    }
    int32_t job[RKV_JOB_N] = {};
    job[RKV_JOB_STREAM] = strm;
    job[RKV_JOB_END]    = n;
    job[RKV_JOB_KEEP]   = n_keep;
    job[RKV_JOB_DST]    = dst_row;
    ggml_backend_tensor_set(idx,  rows.data(), 0, ggml_nbytes(idx));
    ggml_backend_tensor_set(jobs, job, 0, sizeof(job));
    CHECK(b.run(), "compute");
    ggml_backend_tensor_get(t, after.data(), 0, after.size());

    const size_t unit = transposed ? el : ggml_row_size(type, n_embd);
    const int    n_line = transposed ? n_embd*n_head : n_head;
    const auto at = [&](int s, int line, int cell) { return s*t->nb[2] + line*view->nb[2] + cell*view->nb[1]; };
    bool moved = true, others = true;
    for (int line = 0; line < n_line; ++line) {
        for (int r = 0; r < n_keep; ++r) {
            const int from = rows[(line*n_head/n_line)*n_keep + r];
            moved = moved && memcmp(after.data() + at(strm, line, dst_row + r), before.data() + at(strm, line, from), unit) == 0;
        }
    }
    for (const int s : { 0, 2 }) {
        others = others && memcmp(after.data() + s*t->nb[2], before.data() + s*t->nb[2], t->nb[2]) == 0;
    }
    CHECK(moved,  "%s transposed %d threads %d", ggml_type_name(type), transposed, n_threads);
    CHECK(others, "%s transposed %d: another stream changed", ggml_type_name(type), transposed);
}

// new positions reach all heads, from the old end on, shifted by the group's offset
static void test_positions() {
    const int n_cells = 20, n_head = 2, n_stream = 2, shift = 5;
    bench b(2);
    ggml_tensor * pos  = ggml_new_tensor_3d(b.ctx.get(), GGML_TYPE_I32, n_cells, n_head, n_stream);
    ggml_tensor * src  = ggml_new_tensor_2d(b.ctx.get(), GGML_TYPE_I32, n_cells + shift, 1);
    ggml_tensor * jobs = ggml_new_tensor_2d(b.ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
    rkv_op_params par = {};
    ggml_build_forward_expand(b.gf, ggml_rkv_positions(b.ctx.get(), pos, src, jobs, &par));
    b.alloc();

    std::vector<int32_t> from(n_cells + shift), to(n_cells*n_head*n_stream, -7);
    for (size_t i = 0; i < from.size(); ++i) {
        from[i] = 100 + i;
    }
    int32_t job[RKV_JOB_N] = {};
    job[RKV_JOB_STREAM]  = 1;
    job[RKV_JOB_BEGIN]   = 3;
    job[RKV_JOB_OLD_END] = 8;
    job[RKV_JOB_END]     = 15;
    job[RKV_JOB_SHIFT]   = shift;
    ggml_backend_tensor_set(pos,  to.data(), 0, ggml_nbytes(pos));
    ggml_backend_tensor_set(src,  from.data(), 0, ggml_nbytes(src));
    ggml_backend_tensor_set(jobs, job, 0, sizeof(job));
    CHECK(b.run(), "compute");
    ggml_backend_tensor_get(pos, to.data(), 0, ggml_nbytes(pos));
    bool right = true;
    for (int i = 0; i < n_cells*n_head*n_stream; ++i) {
        const int cell = i % n_cells, s = i/(n_cells*n_head);
        const int want = s == 1 && cell >= 8 && cell < 15 ? 100 + cell + shift : -7;
        right = right && to[i] == want;
    }
    CHECK(right, "positions");
}

// equal scores: the lower row wins; NaN never does; pinned and window rows are always there
static void test_select() {
    const int n = 50, n_head = 2, n_keep = 20, begin = 6;
    bench b(2);
    ggml_tensor * z    = ggml_new_tensor_3d(b.ctx.get(), GGML_TYPE_F32, 60, n_head, 1);
    ggml_tensor * jobs = ggml_new_tensor_2d(b.ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
    rkv_op_params par = {};
    par.n_head_kv = n_head;
    par.window    = 4;
    const int pin = 3;
    ggml_tensor * idx = ggml_rkv_select(b.ctx.get(), z, jobs, n_keep, &par);
    ggml_build_forward_expand(b.gf, idx);
    b.alloc();

    std::vector<float> score(60*n_head, 1.0f);
    for (int j = 0; j < 60; ++j) {
        score[60 + j] = j % 2 ? NAN : (float) -j;
    }
    int32_t job[RKV_JOB_N] = {};
    job[RKV_JOB_BEGIN] = begin;
    job[RKV_JOB_END]   = begin + n;
    job[RKV_JOB_KEEP]  = n_keep;
    job[RKV_JOB_PIN]   = pin;
    ggml_backend_tensor_set(z,    score.data(), 0, ggml_nbytes(z));
    ggml_backend_tensor_set(jobs, job, 0, sizeof(job));
    CHECK(b.run(), "compute");
    std::vector<int32_t> got(n_keep*n_head);
    ggml_backend_tensor_get(idx, got.data(), 0, ggml_nbytes(idx));

    for (int h = 0; h < n_head; ++h) {
        std::vector<int32_t> want;
        for (int j = 0; j < pin; ++j) {
            want.push_back(begin + j);
        }
        for (int i = 0, j = h == 0 ? 3 : 4; i < n_keep - par.window - pin; ++i, j += h == 0 ? 1 : 2) {
            want.push_back(begin + j);
        }
        for (int j = n - par.window; j < n; ++j) {
            want.push_back(begin + j);
        }
        CHECK(std::equal(want.begin(), want.end(), got.begin() + h*n_keep), "head %d", h);
    }
}

// scores must be the same bits with one thread and with several
static std::vector<float> scores(int policy, int n_threads, const std::vector<float> & keys, const std::vector<float> & queries) {
    const int n_embd = 80, n_head = 3, n_group = 2, n_cells = 150, window = 6;
    bench b(n_threads);
    ggml_tensor * k    = ggml_new_tensor_3d(b.ctx.get(), GGML_TYPE_F32, n_embd*n_head, n_cells, 1);
    ggml_tensor * q    = ggml_new_tensor_3d(b.ctx.get(), GGML_TYPE_F32, n_embd*n_head*n_group, window + 1, 1);
    ggml_tensor * pos  = ggml_new_tensor_3d(b.ctx.get(), GGML_TYPE_I32, n_cells, n_head, 1);
    ggml_tensor * jobs = ggml_new_tensor_2d(b.ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
    ggml_tensor * aux  = ggml_new_tensor_4d(b.ctx.get(), GGML_TYPE_F32, 2, n_cells, n_head, 1);
    rkv_op_params par = {};
    par.policy = policy;
    par.n_head_kv = n_head;
    par.window = window;
    par.pool   = 7;
    par.n_sim  = 2;
    par.chunk  = 10;
    par.memory = policy == RKV_POLICY_GKV ? 0.8f : 0.0f;
    par.lambda = 0.1f;
    par.threshold = 0.1f;
    par.scale  = 0.1f;
    par.rope_mscale = 1.0f;
    ggml_tensor * z = ggml_rkv_score(b.ctx.get(), k, q, jobs, pos, aux, nullptr, &par);
    ggml_build_forward_expand(b.gf, z);
    b.alloc();
    int32_t job[RKV_JOB_N] = {};
    job[RKV_JOB_END]      = n_cells - 1;
    job[RKV_JOB_QUERY_LO] = 63;
    ggml_backend_tensor_set(k, keys.data(), 0, ggml_nbytes(k));
    ggml_backend_tensor_set(q, queries.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(jobs, job, 0, sizeof(job));
    CHECK(b.run(), "compute");
    std::vector<float> res;
    for (int h = 0; h < n_head; ++h) {
        std::vector<float> row(n_cells - 1 - window);
        ggml_backend_tensor_get(z, row.data(), h*z->nb[1], row.size()*sizeof(float));
        res.insert(res.end(), row.begin(), row.end());
    }
    return res;
}

int main() {
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
            GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
        for (const int n_threads : { 1, 2, 5 }) {
            test_compact(type, false, n_threads);
            if (!ggml_is_quantized(type)) {
                test_compact(type, true, n_threads);
            }
        }
    }
    test_positions();
    test_select();

    const auto keys = random_floats(80*3*150), queries = random_floats(80*3*2*7);
    for (const int policy : { RKV_POLICY_RKV, RKV_POLICY_SNAPKV, RKV_POLICY_STREAMING, RKV_POLICY_LATEST, RKV_POLICY_H2O, RKV_POLICY_GKV,
            RKV_POLICY_RPC, RKV_POLICY_CHUNKKV, RKV_POLICY_KEYDIFF }) {
        const auto one = scores(policy, 1, keys, queries);
        for (const int n_threads : { 2, 3, 7 }) {
            const auto many = scores(policy, n_threads, keys, queries);
            CHECK(memcmp(one.data(), many.data(), one.size()*sizeof(float)) == 0, "policy %d threads %d", policy, n_threads);
        }
        CHECK(std::all_of(one.begin(), one.end(), [](float x) { return std::isfinite(x); }), "policy %d", policy);
    }
    printf("%d passed, %d failed\n", n_checks - n_failed, n_failed);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
