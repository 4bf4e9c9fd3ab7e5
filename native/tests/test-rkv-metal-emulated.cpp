// The Metal kernels and the code that launches them over the table of cases (rkv-cases.h), on the CPU: docs/metal.md.
// All but the largest run in several orders of threads, threadgroups and kernels, which must not matter to a single bit.
//
//     test-rkv-metal-emulated [-c PART_OF_A_NAME] [-t]

#include "metal/emulator.h"
#include "rkv-cases.h"

#include "ggml-cpp.h"

#include <algorithm>
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
        c.n_head_kv = std::min(c.n_head_kv, 2);
    }
    return c;
}

template<typename T> static bool same_bytes(const std::vector<T> & a, const std::vector<T> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(T)) == 0;
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
    for (const auto order : { EMULATOR_BACKWARD, EMULATOR_SHUFFLED }) {
        const bool skip = order == EMULATOR_SHUFFLED ? c.n_cells*c.n_head_kv*c.n_embd_k > 20480 : c.n_cells > 1000;
        if (!err.empty() || skip) {
            break;
        }
        err = run(metal, c, data, order, again);
        if (err.empty() && !(same_bytes(got.score, again.score) && same_bytes(got.idx, again.idx) && same_bytes(got.k, again.k) &&
                same_bytes(got.v, again.v) && same_bytes(got.pos, again.pos) && same_bytes(got.aux, again.aux))) {
            err = "depends on the order of threads";
        }
    }
    return err;
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

    // the switch that leaves the pass to other ops
    const rkv_case & any = rkv_cases().front();
    set_env("0");
    const std::string off = rkv_case_run(metal.get(), any, rkv_case_inputs(any)).error;
    set_env(nullptr);
    report("RKV_METAL_KERNELS=0", off.find("not supported") == 0 ? "" : "the kernels are still offered");

    int n_left_out = 0;
    for (const auto & c : rkv_cases()) {
        if (c.name.find(part) == std::string::npos) {
            continue;
        }
        if (part.empty() && too_large(c)) {
            ++n_left_out;
            continue;
        }
        const int64_t t0 = ggml_time_ms();
        report(c.name, test_case(cpu.get(), metal.get(), narrowed(c)));
        if (times) {
            printf("%6d ms  %s\n", (int) (ggml_time_ms() - t0), c.name.c_str());
        }
    }
    printf("%d passed, %d failed, %d left out for their size\n", n_passed, n_failed, n_left_out);
    return n_failed || !n_passed ? EXIT_FAILURE : EXIT_SUCCESS;
}
