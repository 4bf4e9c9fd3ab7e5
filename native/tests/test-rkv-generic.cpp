// The pass out of other ops (native/rkv-generic.h), over the table of cases that every backend is held to.
//   test-rkv-generic [-d DEVICE] [-v]    DEVICE: a ggml device's name, the CPU where none is given

#include "rkv-cases.h"
#include "rkv-generic.h"

#include "ggml-cpp.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static size_t temp_max = 0;

static void force(bool on) {
#ifdef _WIN32
    _putenv_s("RKV_GENERIC", on ? "1" : "0");
#else
    setenv("RKV_GENERIC", on ? "1" : "0", 1);
#endif
}

static rkv_case_result run(ggml_backend_t home, rkv_generic & generic, const rkv_case & c, const rkv_case_data & d, const rkv_case_result & want) {
    rkv_case_result r;
    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*16, nullptr, true }) };
    rkv_case_tensors t;
    t.k = ggml_new_tensor_3d(ctx.get(), c.type_k, (int64_t) c.n_embd_k*c.n_head_kv, c.n_cells, c.n_stream);
    if (c.n_embd_v > 0) {
        t.v = ggml_new_tensor_3d(ctx.get(), c.type_v, (int64_t) c.n_embd_v*c.n_head_kv, c.n_cells, c.n_stream);
    }
    t.q   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, (int64_t) c.n_embd_k*c.n_head_kv*c.n_group, c.window + 1, c.n_stream);
    t.pos = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, c.n_cells, c.n_head_kv, c.n_stream);
    if (!d.aux.empty()) {
        t.aux = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, c.n_aux, c.n_cells, c.n_head_kv, c.n_stream);
    }
    if (!d.stats.empty()) {
        const int64_t n_head = c.n_head_kv*c.n_group;
        t.stats = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d.stats.size()/n_head/c.n_stream, n_head, c.n_stream);
    }
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), home) };
    if (!buf) {
        r.error = "out of memory";
        return r;
    }
    rkv_case_set(t, d);

    const rkv_op_params par = rkv_case_params(c);
    rkv_generic_layer layer = { t.k, t.q, t.pos, t.aux, d.rope.empty() ? nullptr : &d.rope, par,
        (uint32_t) std::max(c.recent, c.window), nullptr,
        rkv_needs_values(&par) ? t.v : nullptr, c.v_trans, c.n_embd_v, t.stats, {} };
    const auto views = [&](ggml_context * in) { return rkv_case_moved(in, c, t); };
    if (!rkv_generic::check(ggml_backend_get_device(home), views)) {
        r.error = "the device does not copy";
        return r;
    }
    r.score = want.score; // of sequences that lose nothing: they are not scored
    r.idx.assign(want.idx.size(), -1);
    for (size_t i = 0; i < c.jobs.size(); ++i) {
        rkv_generic_result res;
        if (t.stats) {
            layer.q_pos.assign(d.q_pos.begin() + i*c.window, d.q_pos.begin() + (i + 1)*c.window);
        }
        if (!generic.pass(home, layer, d.jobs.data() + i*RKV_JOB_N, d.new_pos.data() + i*d.n_new, views, &res)) {
            r.error = "failed to compute";
            return r;
        }
        temp_max = std::max(temp_max, res.temp);
        const int n = c.jobs[i].end - c.jobs[i].begin, n_keep = std::min(c.jobs[i].keep, n), n_cand = n - c.window;
        for (int h = 0; h < c.n_head_kv; ++h) {
            const size_t at = i*c.n_head_kv + h;
            std::copy_n(res.rows.begin() + (size_t) h*n_keep, n_keep, r.idx.begin() + at*d.n_keep_max);
            if (!res.score.empty()) {
                std::copy_n(res.score.begin() + (size_t) h*n_cand, n_cand, r.score.begin() + at*c.n_cells);
            }
        }
    }
    rkv_case_get(t.k, r.k);
    rkv_case_get(t.v, r.v);
    rkv_case_get(t.pos, r.pos);
    rkv_case_get(t.aux, r.aux);
    rkv_case_get(t.stats, r.stats);
    return r;
}

// rows of all heads alike, as holes are closed: every layout, also heads whose bytes are no whole words
static int test_gather(ggml_backend_t home, rkv_generic & generic) {
    constexpr int n_cells = 50, n_head = 3, n_stream = 2, end = 47, dst = 2, strm = 1;
    int n_failed = 0;
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1, GGML_TYPE_I32 }) {
        for (const int n_embd : { 32, 64, 96 }) {
            for (const bool transposed : { false, true }) {
                if (transposed && ggml_is_quantized(type)) {
                    continue;
                }
                ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*4, nullptr, true }) };
                ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), type, n_embd*n_head, n_cells, n_stream);
                ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), home) };
                std::vector<uint8_t> before(ggml_nbytes(t)), after(before.size());
                for (size_t i = 0; i < before.size(); ++i) {
                    before[i] = (uint8_t) (i*2654435761u >> 13);
                }
                ggml_backend_tensor_set(t, before.data(), 0, before.size());
                const size_t el = ggml_type_size(type), unit = transposed ? el : ggml_row_size(type, n_embd);
                const size_t cell = transposed ? el : t->nb[1], line = transposed ? el*n_cells : unit;
                const int n_line = transposed ? n_embd*n_head : n_head;
                const auto views = [&](ggml_context * in) -> std::vector<ggml_tensor *> {
                    return { ggml_view_4d(in, t, transposed ? 1 : n_embd, n_cells, n_line, n_stream, cell, line, t->nb[2], 0) };
                };
                std::vector<int32_t> rows;
                for (int r = dst; r < end; r += r % 3 + 1) {
                    rows.push_back(r);
                }
                int32_t job[RKV_JOB_N] = {};
                job[RKV_JOB_STREAM] = strm;
                job[RKV_JOB_END]    = end;
                job[RKV_JOB_KEEP]   = rows.size();
                job[RKV_JOB_DST]    = dst;
                const bool ran = generic.gather(home, job, rows, views);
                ggml_backend_tensor_get(t, after.data(), 0, after.size());

                std::vector<uint8_t> want = before;
                for (int l = 0; l < n_line; ++l) {
                    for (size_t r = 0; r < rows.size(); ++r) {
                        const size_t base = strm*t->nb[2] + l*line;
                        memcpy(want.data() + base + (dst + r)*cell, before.data() + base + rows[r]*cell, unit);
                    }
                }
                if (!ran || after != want) {
                    printf("gather %s %d transposed %d: %s\n", ggml_type_name(type), n_embd, transposed, ran ? "wrong bytes" : "failed");
                    ++n_failed;
                }
            }
        }
    }
    return n_failed;
}

int main(int argc, char ** argv) {
    const char * name = nullptr;
    bool verbose = false;
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "-d") == 0 && i + 1 < argc) {
            name = argv[++i];
        } else if (strcmp(argv[i], "-v") == 0) {
            verbose = true;
        }
    }
    ggml_backend_load_all();
    ggml_backend_ptr cpu { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_backend_ptr other { name ? ggml_backend_init_by_name(name, nullptr) : nullptr };
    if (!cpu || (name && !other)) {
        printf("there is no device %s\n", name ? name : "CPU");
        return EXIT_FAILURE;
    }
    ggml_backend_t home = other ? other.get() : cpu.get();
    rkv_generic generic(cpu.get());

    force(true);
    printf("F32 products are %s on %s\n", generic.is_exact(home) ? "exact" : "rounded", ggml_backend_name(home));
    int n_failed = test_gather(home, generic), n_run = 0;
    static const char * const modes[] = { "", " (split)", " (kernels where there are some)" };
    for (int mode = 0; mode < 3; ++mode) {
        force(mode < 2);
        generic.force_split = mode == 1;
        for (const auto & c : rkv_cases()) {
            const auto d    = rkv_case_inputs(c);
            const auto want = rkv_case_run(cpu.get(), c, d);
            const auto err  = rkv_case_compare(c, d, want, run(home, generic, c, d, want));
            ++n_run;
            if (!err.empty() || verbose) {
                printf("%s%s: %s\n", c.name.c_str(), modes[mode], err.empty() ? "ok" : err.c_str());
                fflush(stdout);
            }
            n_failed += !err.empty();
        }
    }
    force(true);
    { // more keys than fit into the temporary memory at once
        rkv_case c = rkv_cases().front();
        for (const int policy : { RKV_POLICY_RKV, RKV_POLICY_LATEST }) {
            c.name      = "4096 cells of 8 heads";
            c.policy    = policy;
            c.type_k    = c.type_v = GGML_TYPE_F16;
            c.n_rot     = policy == RKV_POLICY_LATEST ? 128 : 0;
            c.n_head_kv = 8;
            c.n_group   = 4;
            c.n_cells   = 4096;
            c.n_stream  = 1;
            c.jobs      = { { 0, 0, 2048, 4096, 2048, 0, 0, 0xff } };
            const auto d    = rkv_case_inputs(c);
            const auto want = rkv_case_run(cpu.get(), c, d);
            const auto err  = rkv_case_compare(c, d, want, run(home, generic, c, d, want));
            printf("%s: %s\n", c.name.c_str(), err.empty() ? "ok" : err.c_str());
            n_failed += !err.empty();
        }
    }
    if (temp_max > RKV_GENERIC_TEMP) {
        printf("%zu bytes of temporary memory are more than %zu\n", temp_max, RKV_GENERIC_TEMP);
        ++n_failed;
    }
    printf("%s: %d cases run, %d failed, %.1f MiB of temporary memory\n", ggml_backend_name(home), n_run, n_failed, temp_max/1048576.0);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
