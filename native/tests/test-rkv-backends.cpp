// The table of cases (rkv-cases.h) on every device of this build that runs the op, against the CPU.
//
//     test-rkv-backends [-d DEVICE] [-c PART_OF_A_NAME] [-l]

#include "rkv-cases.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static ggml_backend_ptr cpu_backend(int n_threads) {
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))(backend.get(), n_threads);
    return backend;
}

static int n_failed = 0, n_passed = 0;

static void report(const std::string & where, const std::string & name, const std::string & err) {
    if (err.empty()) {
        ++n_passed;
        return;
    }
    ++n_failed;
    printf("%s: %s: %s\n", where.c_str(), name.c_str(), err.c_str());
    fflush(stdout);
}

// a comparison that lets a wrong result through is no comparison
static void test_compare(ggml_backend_t cpu) {
    const auto wrong = [&](const rkv_case & c, const char * what, const std::function<void(rkv_case_result &)> & spoil) {
        const auto data = rkv_case_inputs(c);
        const auto want = rkv_case_run(cpu, c, data);
        auto got = want;
        spoil(got);
        report("comparison", std::string("wrong ") + what, rkv_case_compare(c, data, want, got).empty() ? "not noticed" : "");
    };
    const auto find = [](const char * name) {
        for (const auto & c : rkv_cases()) {
            if (c.name == name) {
                return c;
            }
        }
        GGML_ABORT("no case %s", name);
    };
    const rkv_case c = find("latest ragged");
    wrong(c, "K",        [](auto & r) { r.k[r.k.size() - 1] ^= 1; });
    wrong(c, "V",        [](auto & r) { r.v[0] ^= 1; });
    wrong(c, "position", [](auto & r) { r.pos[0] += 1; });
    wrong(c, "float",    [](auto & r) { r.aux[((size_t) 5*2*160)*2] += 1e-3f; });
    wrong(c, "score",    [](auto & r) { r.score[20] += 1e-3f; });
    wrong(c, "error",    [](auto & r) { r.error = "x"; });
    wrong(c, "row",      [](auto & r) { std::swap(r.idx[0], r.idx[1]); });
    const rkv_case tri = find("triattention ragged");
    wrong(tri, "statistic", [](auto & r) { r.stats[0] += 1e-3f; });
    wrong(tri, "score of it", [](auto & r) { r.score[10] += 1e-2f; });
    // a set that is ascending and gathered as it says, and still not the one to keep
    const rkv_case other = find("snapkv one evicted");
    const auto data = rkv_case_inputs(other);
    const auto want = rkv_case_run(cpu, other, data);
    rkv_case reversed = other;
    reversed.policy = RKV_POLICY_STREAMING;
    auto got = rkv_case_run(cpu, reversed, data);
    got.score = want.score;
    report("comparison", "wrong set", rkv_case_compare(other, data, want, got).empty() ? "not noticed" : "");
}

int main(int argc, char ** argv) {
    std::string device, part;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-l" || arg == "--list") {
            for (const auto & c : rkv_cases()) {
                printf("%s\n", c.name.c_str());
            }
            return EXIT_SUCCESS;
        }
        if ((arg == "-d" || arg == "-c") && i + 1 < argc) {
            (arg == "-d" ? device : part) = argv[++i];
        } else {
            fprintf(stderr, "usage: %s [-d DEVICE] [-c PART_OF_A_NAME] [-l]\n", argv[0]);
            return EXIT_FAILURE;
        }
    }
    ggml_backend_load_all();

    struct target { std::string name; ggml_backend_ptr backend; };
    std::vector<target> targets;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        const std::string name = ggml_backend_dev_name(dev);
        if (device.empty() ? ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU : device != name) {
            continue;
        }
        targets.push_back({ name, ggml_backend_ptr { ggml_backend_dev_init(dev, nullptr) } });
    }
    if (!device.empty() && targets.empty()) {
        fprintf(stderr, "there is no device %s\n", device.c_str());
        return EXIT_FAILURE;
    }

    const auto cpu = cpu_backend(4), cpu_one = cpu_backend(1);
    if (part.empty()) {
        test_compare(cpu.get());
    }

    int n_left = 0; // to the CPU
    std::vector<std::string> idle; // devices that do not know the op at all
    for (const auto & c : rkv_cases()) {
        if (c.name.find(part) == std::string::npos) {
            continue;
        }
        const auto data = rkv_case_inputs(c);
        const auto want = rkv_case_run(cpu.get(), c, data);
        if (device.empty()) {
            const auto one = rkv_case_run(cpu_one.get(), c, data);
            std::string err = rkv_case_compare(c, data, want, one);
            if (err.empty() && (want.idx != one.idx || memcmp(want.aux.data(), one.aux.data(), want.aux.size()*sizeof(float)) != 0 ||
                    memcmp(want.stats.data(), one.stats.data(), want.stats.size()*sizeof(float)) != 0)) {
                err = "depends on the number of threads";
            }
            report("CPU", c.name, err);
        }
        for (const auto & t : targets) {
            const auto got = rkv_case_run(t.backend.get(), c, data);
            if (rkv_case_is_optional(c) && t.name.find("CUDA") != 0 && got.error.find("not supported") == 0) {
                ++n_left;
                continue;
            }
            if (device.empty() && got.error.find("not supported") == 0 && &c == &rkv_cases().front()) {
                idle.push_back(t.name);
            }
            if (std::find(idle.begin(), idle.end(), t.name) == idle.end()) {
                report(t.name, c.name, rkv_case_compare(c, data, want, got));
            }
        }
    }
    for (const auto & name : idle) {
        printf("%s: has no kernels for the op\n", name.c_str());
    }
    printf("%d passed, %d failed, %d left to the CPU\n", n_passed, n_failed, n_left);
    return n_failed || !n_passed ? EXIT_FAILURE : EXIT_SUCCESS;
}
