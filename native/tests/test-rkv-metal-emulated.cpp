// The Metal kernels and the code that launches them over the table of cases (rkv-cases.h), on the CPU: docs/metal.md.
// All but the largest run in two orders of threads, threadgroups and kernels, which must not matter to a single bit.
//
//     test-rkv-metal-emulated [-c PART_OF_A_NAME] [-t]

#include "metal/emulator.h"
#include "rkv-cases.h"
#include "rkv-metal.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static int n_failed = 0, n_passed = 0;

static void report(const std::string & name, const std::string & err) {
    ++(err.empty() ? n_passed : n_failed);
    if (!err.empty()) {
        printf("%s: %s\n", name.c_str(), err.c_str());
        fflush(stdout);
    }
}

static void set_env(const char * value) {
    if (value) {
        setenv("RKV_METAL_KERNELS", value, 1);
    } else {
        unsetenv("RKV_METAL_KERNELS");
    }
}

// every thread of every product of two keys is a fiber here: what is large in the table is made smaller, or left out
static bool too_large(const rkv_case & c) { return c.n_cells > 2000; }

static rkv_case narrowed(rkv_case c) {
    if (c.n_cells > 1000) {
        c.n_head_kv = 1;
    }
    return c;
}

template<typename T> static bool same_bytes(const std::vector<T> & a, const std::vector<T> & b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size()*sizeof(T)) == 0);
}

static std::string run(ggml_backend_t backend, const rkv_case & c, const rkv_case_data & d, emulator_order order, rkv_case_result & r) {
    emulator_set_order(order);
    r = rkv_case_run(backend, c, d);
    const std::string err = emulator_take_error();
    return err.empty() ? r.error : err;
}

static std::string test_case(ggml_backend_t cpu, ggml_backend_t metal, const rkv_case & c) {
    const auto data = rkv_case_inputs(c);
    const auto want = rkv_case_run(cpu, c, data);

    rkv_case_result got, again;
    std::string err = run(metal, c, data, EMULATOR_FORWARD, got);
    if (err.empty()) {
        err = rkv_case_compare(c, data, want, got);
    }
    if (err.empty() && c.n_cells <= 1000) {
        const bool small = c.n_cells*c.n_head_kv*c.n_embd_k <= 20480; // shuffling takes time
        err = run(metal, c, data, small ? EMULATOR_SHUFFLED : EMULATOR_BACKWARD, again);
        if (err.empty() && !(same_bytes(got.score, again.score) && same_bytes(got.idx, again.idx) && same_bytes(got.k, again.k) &&
                same_bytes(got.v, again.v) && same_bytes(got.pos, again.pos) && same_bytes(got.aux, again.aux))) {
            err = "depends on the order of threads";
        }
    }
    return err;
}

// scores that the table's formulas do not give: equal ones, zeros of both signs, infinities, NaN among numbers
static std::string test_select(ggml_backend_t cpu, ggml_backend_t metal) {
    const int n = 700, n_head = 4, begin = 5, n_keep = 300;
    const float some[] = { 1.0f, -1.0f, 0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-42f, -3e38f, 0.5f, -NAN };

    std::vector<float> z((size_t) (n + begin)*n_head);
    for (size_t i = 0; i < z.size(); ++i) {
        const size_t h = i/(n + begin), j = i%(n + begin);
        z[i] = h == 0 ? 1.0f : h == 1 ? (j % 3 ? NAN : -(float) j) : some[(j*7 + j/5) % (h == 2 ? 11 : 6)];
    }
    std::vector<int32_t> idx[2];
    for (int i = 0; i < 2; ++i) {
        ggml_backend_t backend = i == 0 ? cpu : metal;
        ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*8 + ggml_graph_overhead(), nullptr, true }) };
        ggml_tensor * score = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n + begin, n_head, 1);
        ggml_tensor * jobs  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
        rkv_op_params par = {};
        par.window = 8;
        ggml_tensor * sel = ggml_rkv_select(ctx.get(), score, jobs, n_keep, &par);
        ggml_cgraph * gf  = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(gf, sel);
        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
        int32_t job[RKV_JOB_N] = {};
        job[RKV_JOB_BEGIN] = begin;
        job[RKV_JOB_END]   = begin + n;
        job[RKV_JOB_KEEP]  = n_keep;
        job[RKV_JOB_PIN]   = 3;
        ggml_backend_tensor_set(score, z.data(), 0, ggml_nbytes(score));
        ggml_backend_tensor_set(jobs, job, 0, sizeof(job));
        if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
            return emulator_take_error() + " (failed)";
        }
        idx[i].resize(ggml_nelements(sel));
        ggml_backend_tensor_get(sel, idx[i].data(), 0, ggml_nbytes(sel));
    }
    return idx[0] == idx[1] ? "" : "another selection than the CPU's";
}

int main(int argc, char ** argv) {
    std::string part;
    bool times = false;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-c" && i + 1 < argc) {
            part = argv[++i];
        } else if (arg == "-t") {
            times = true;
        } else {
            fprintf(stderr, "usage: %s [-c PART_OF_A_NAME] [-t]\n", argv[0]);
            return EXIT_FAILURE;
        }
    }
    ggml_backend_ptr cpu   { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_backend_ptr metal { emulator_backend_init() };

    const auto refused = [&] {
        const rkv_case & any = rkv_cases().front();
        return rkv_case_run(metal.get(), any, rkv_case_inputs(any)).error.find("not supported") == 0;
    };
    set_env("0");
    report("RKV_METAL_KERNELS=0", refused() ? "" : "the kernels are still offered");
    set_env(nullptr);

    report("selection", test_select(cpu.get(), metal.get()));

    int n_left_out = 0;
    for (const auto & c : rkv_cases()) {
        if (c.name.find(part) == std::string::npos) {
            continue;
        }
        if (part.empty() && too_large(c)) {
            ++n_left_out;
            continue;
        }
        if (rkv_case_is_optional(c)) { // no kernels for these
            const std::string err = rkv_case_run(metal.get(), c, rkv_case_inputs(c)).error;
            report(c.name, err.find("not supported") == 0 ? "" : "is not refused");
            continue;
        }
        const int64_t t0 = ggml_time_ms();
        report(c.name, test_case(cpu.get(), metal.get(), narrowed(c)));
        if (times) {
            printf("%6d ms  %s\n", (int) (ggml_time_ms() - t0), c.name.c_str());
        }
    }
    rkv_metal_no_kernels();
    report("kernels that do not compile", refused() ? "" : "are still offered");

    printf("%d passed, %d failed, %d left out for their size\n", n_passed, n_failed, n_left_out);
    return n_failed || !n_passed ? EXIT_FAILURE : EXIT_SUCCESS;
}
