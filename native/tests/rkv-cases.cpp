#include "rkv-cases.h"

#include "rkv-rope.h"
#include "rkv-unrotate.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>

static bool values_of(const rkv_case & c) {
    const rkv_op_params p = rkv_case_params(c);
    return rkv_needs_values(&p);
}

//
// the table
//

static constexpr int      RKV_CASE_NODES = 16384;
static constexpr uint64_t ALL_SLOTS = ~0ull;

static uint64_t slots_of(int window) { return window == 64 ? ALL_SLOTS : (1ull << window) - 1; }

// two sequences of different lengths: the first was compacted before, the second was not
static std::vector<rkv_case_job> two_jobs(const rkv_case & c) {
    const int n = c.n_cells, keep = n/2 + c.window/2 + c.pin/2;
    return {
        { c.n_stream - 1, 0, keep, n,         keep,     0, 0, slots_of(c.window) },
        { 0,              3, 3,    n - n/8 - 1, keep - 5, 2, 0, slots_of(c.window) },
    };
}

static std::vector<rkv_case> make_cases() {
    static const char * const policies[] = { "none", "rkv", "snapkv", "streaming", "latest", "h2o", "gkv", "rpc",
        "chunkkv", "value-aware", "keydiff", "lagkv", "triattention", "given" };
    std::vector<rkv_case> all;

    const auto add = [&](const std::string & what, int policy, const std::function<void(rkv_case &)> & change) {
        rkv_case c;
        c.policy = policy;
        c.name   = std::string(policies[policy]) + " " + what;
        if (policy == RKV_POLICY_LATEST) {
            c.n_sim = c.n_aux = 2;
        }
        if (rkv_needs_rope(policy)) {
            c.n_rot = c.n_embd_k;
        }
        if (policy == RKV_POLICY_GKV) {
            c.lambda = 0.5f;
            c.pool   = 1;
            c.memory = 0.8f;
        }
        change(c);
        if (!rkv_needs_rope(policy)) {
            c.n_rot = 0;
        }
        const rkv_op_params par = rkv_case_params(c);
        c.n_aux = policy == RKV_POLICY_LATEST && c.memory == 0.0f ? c.n_aux : std::max(1, rkv_n_aux(&par));
        c.n_rot = std::min(c.n_rot, c.n_embd_k);
        if (c.jobs.empty()) {
            c.jobs = two_jobs(c);
        }
        all.push_back(c);
    };
    const auto full = [](rkv_case & c, int n_embd) {
        c.n_embd_k = c.n_embd_v = n_embd;
        c.n_rot = n_embd;
    };
    const int scored[] = { RKV_POLICY_RKV, RKV_POLICY_LATEST };
    const int every[]  = { RKV_POLICY_RKV, RKV_POLICY_SNAPKV, RKV_POLICY_STREAMING, RKV_POLICY_LATEST };

    // types
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
            GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
        for (const int policy : every) {
            add(std::string("K and V ") + ggml_type_name(type), policy, [&](rkv_case & c) {
                full(c, 128);
                c.type_k = c.type_v = type;
                c.n_group = 4;
                c.n_hadamard = ggml_is_quantized(type) ? 128 : 0;
            });
        }
    }
    add("K q8_0, V q4_0", RKV_POLICY_RKV, [&](rkv_case & c) { c.type_k = GGML_TYPE_Q8_0; c.type_v = GGML_TYPE_Q4_0; });
    add("K f16, V q8_0 wider", RKV_POLICY_RKV, [&](rkv_case & c) { c.n_embd_k = 192; c.n_embd_v = 128; c.type_v = GGML_TYPE_Q8_0; });

    // head sizes
    for (const int n_embd : { 64, 80, 96, 112, 128, 192, 256 }) {
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            if (n_embd % ggml_blck_size(type)) {
                continue;
            }
            for (const int policy : scored) {
                add("head " + std::to_string(n_embd) + " " + ggml_type_name(type), policy, [&](rkv_case & c) {
                    full(c, n_embd);
                    c.type_k = c.type_v = type;
                });
            }
        }
    }
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int policy : scored) {
            add(std::string("MLA 576 ") + ggml_type_name(type), policy, [&](rkv_case & c) {
                c.n_embd_k = 576;
                c.n_embd_v = 0;
                c.n_rot = 64;
                c.n_head_kv = 1;
                c.n_group = 16;
                c.type_k = type;
            });
        }
    }

    // shapes
    for (const int n_group : { 1, 2, 5, 8, 16, 64 }) {
        add("group " + std::to_string(n_group), RKV_POLICY_RKV, [&](rkv_case & c) { c.n_group = n_group; });
    }
    for (const int n_head : { 1, 3, 8, 32 }) {
        add("KV heads " + std::to_string(n_head), RKV_POLICY_RKV, [&](rkv_case & c) { c.n_head_kv = n_head; c.n_group = 1; });
    }
    for (const int window : { 1, 2, 16, 33, 64 }) {
        for (const int policy : scored) {
            add("window " + std::to_string(window), policy, [&](rkv_case & c) { c.window = window; });
        }
    }
    for (const int recent : { 9, 40 }) {
        for (const int policy : scored) {
            add("recent " + std::to_string(recent), policy, [&](rkv_case & c) { c.recent = recent; });
        }
    }
    for (const int pin : { 0, 1, 20 }) {
        for (const int policy : every) {
            add("pin " + std::to_string(pin), policy, [&](rkv_case & c) { c.pin = pin; });
        }
    }
    for (const int pool : { 1, 3, 15 }) {
        add("pool " + std::to_string(pool), RKV_POLICY_RKV, [&](rkv_case & c) { c.pool = pool; });
    }
    for (const int policy : every) {
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
            add(std::string("transposed V ") + ggml_type_name(type), policy, [&](rkv_case & c) { c.v_trans = true; c.type_v = type; });
        }
    }

    // formula
    for (const float lambda : { 0.0f, 0.5f, 1.0f }) {
        for (const int policy : scored) {
            add("lambda " + std::to_string(lambda).substr(0, 3), policy, [&](rkv_case & c) { c.lambda = lambda; });
        }
    }
    for (const float threshold : { 0.05f, 0.3f, 0.8f, 1.5f }) {
        add("threshold " + std::to_string(threshold).substr(0, 4), RKV_POLICY_RKV, [&](rkv_case & c) { c.threshold = threshold; });
    }
    for (const int policy : scored) {
        add("soft-cap", policy, [&](rkv_case & c) { c.softcap = 2.0f; });
        add("NaN key", policy, [&](rkv_case & c) { c.nan_key = true; });
    }
    add("reference", RKV_POLICY_RKV, [&](rkv_case & c) { c.reference = true; });
    add("reference, few copies", RKV_POLICY_RKV, [&](rkv_case & c) { c.reference = true; c.threshold = 0.9f; });
    add("reference q8_0 112 cells", RKV_POLICY_RKV, [&](rkv_case & c) { c.reference = true; c.type_k = GGML_TYPE_Q8_0; c.n_cells = 112; });

    // rotation
    for (const bool neox : { false, true }) {
        const std::string kind = neox ? " neox" : " normal";
        add("rope" + kind, RKV_POLICY_LATEST, [&](rkv_case & c) { c.neox = neox; });
        add("rope half" + kind, RKV_POLICY_LATEST, [&](rkv_case & c) { c.neox = neox; c.n_rot = 32; });
        add("rope mscale" + kind, RKV_POLICY_LATEST, [&](rkv_case & c) { c.neox = neox; c.mscale = 1.37f; });
        add("rope q8_0 Hadamard 64" + kind, RKV_POLICY_LATEST, [&](rkv_case & c) {
            c.neox = neox;
            c.n_hadamard = 64;
            c.type_k = GGML_TYPE_Q8_0;
            full(c, 192);
        });
        add("rope q4_0 Hadamard 256" + kind, RKV_POLICY_LATEST, [&](rkv_case & c) {
            c.neox = neox;
            c.n_hadamard = 256;
            c.type_k = GGML_TYPE_Q4_0;
            full(c, 256);
        });
    }
    add("no rope", RKV_POLICY_LATEST, [&](rkv_case & c) { c.n_rot = 0; });
    for (const int n_sim : { 1, 3, 4 }) {
        add("similarities " + std::to_string(n_sim), RKV_POLICY_LATEST, [&](rkv_case & c) { c.n_sim = c.n_aux = n_sim; });
    }
    add("similarities 2 of 4", RKV_POLICY_LATEST, [&](rkv_case & c) { c.n_sim = 2; c.n_aux = 4; });

    // jobs
    for (const int policy : every) {
        add("one job, fresh", policy, [&](rkv_case & c) { c.jobs = { { 1, 0, 0, 160, 80, 0, 0, 0xff } }; });
        add("ragged", policy, [&](rkv_case & c) {
            c.n_stream = 6;
            c.jobs = {
                { 5, 0,  70,  160, 70, 0,  0,  0xff },
                { 1, 13, 13,  150, 70, 4,  0,  0xff },
                { 3, 9,  40,  49,  40, 9,  0,  0xff }, // keeps all that it has
                { 0, 4,  100, 101, 93, 4,  0,  0x01 }, // one query is left
                { 4, 1,  1,   14,  13, 1,  0,  0xf0 }, // barely more than the window and the pins
                { 2, 0,  0,   41,  16, 0,  0,  0x5a },
            };
        });
        add("a group with a smaller budget", policy, [&](rkv_case & c) {
            c.jobs = { { 1, 0, 40, 160, 40, 0, 96, 0xff }, { 2, 30, 30, 131, 40, 0, 96, 0xff } };
        });
        add("shorter than the window", policy, [&](rkv_case & c) {
            c.jobs = { { 1, 5, 5, 11, 6, 2, 0, 0x3f }, { 0, 0, 64, 128, 64, 0, 0, 0xff } };
        });
        add("16 sequences", policy, [&](rkv_case & c) {
            c.n_cells  = 96;
            c.n_stream = 17;
            for (int i = 0; i < 16; ++i) {
                c.jobs.push_back({ (i*5 + 1) % 17, i % 3, 64, 96 - (i % 4), 64 - i % 3, 0, 0, 0xff });
            }
        });
        add("one evicted", policy, [&](rkv_case & c) { c.jobs = { { 0, 0, 128, 129, 128, 0, 0, 0xff } }; });
        add("one candidate kept", policy, [&](rkv_case & c) { c.jobs = { { 0, 0, 0, 160, 13, 0, 0, 0xff } }; });
        add("no candidate kept", policy, [&](rkv_case & c) { c.jobs = { { 0, 0, 0, 160, 12, 0, 0, 0xff } }; });
    }

    // the policies that other backends may leave to the CPU
    for (int policy = RKV_POLICY_H2O; policy < RKV_POLICY_COUNT; ++policy) {
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            add(std::string("K and V ") + ggml_type_name(type), policy, [&](rkv_case & c) {
                full(c, 128);
                c.type_k = c.type_v = type;
                c.n_hadamard = c.n_hadamard_v = ggml_is_quantized(type) ? 128 : 0;
            });
        }
        add("transposed V f16", policy, [&](rkv_case & c) { c.v_trans = true; });
        add("head 96", policy, [&](rkv_case & c) { full(c, 96); });
        add("group 1, KV heads 3", policy, [&](rkv_case & c) { c.n_group = 1; c.n_head_kv = 3; });
        for (const int pin : { 0, 20 }) {
            add("pin " + std::to_string(pin), policy, [&](rkv_case & c) { c.pin = pin; });
        }
        for (const int window : { 1, 33 }) {
            add("window " + std::to_string(window), policy, [&](rkv_case & c) { c.window = window; });
        }
        add("soft-cap", policy, [&](rkv_case & c) { c.softcap = 2.0f; });
        add("one job, fresh", policy, [&](rkv_case & c) { c.jobs = { { 1, 0, 0, 160, 80, 0, 0, 0xff } }; });
        add("ragged", policy, [&](rkv_case & c) {
            c.n_stream = 4;
            c.jobs = {
                { 3, 9,  40,  79,  70, 9,  0,  0xff }, // keeps all that it has
                { 0, 4,  100, 101, 93, 4,  0,  0x01 }, // one query is left
                { 2, 0,  0,   41,  16, 0,  0,  0x5a },
            };
        });
        add("a group with a smaller budget", policy, [&](rkv_case & c) {
            c.jobs = { { 1, 0, 40, 160, 40, 0, 96, 0xff }, { 2, 30, 30, 131, 40, 0, 96, 0xff } };
        });
        add("8B layer", policy, [&](rkv_case & c) {
            full(c, 128);
            c.n_head_kv = 8;
            c.n_group = 4;
            c.n_cells = 1152;
            c.n_stream = 2;
            c.jobs = { { 1, 0, 1024, 1152, 1024, 0, 0, 0xff } };
        });
    }
    // what their kernels could get wrong
    for (int policy = RKV_POLICY_H2O; policy <= RKV_POLICY_TRIATTENTION; ++policy) {
        add("K 192, V 128 q8_0", policy, [&](rkv_case & c) {
            full(c, 192);
            c.n_embd_v = 128;
            c.type_k   = c.type_v = GGML_TYPE_Q8_0;
        });
        add("K 80, V 112 bf16", policy, [&](rkv_case & c) {
            full(c, 80);
            c.n_embd_v = 112;
            c.type_k   = c.type_v = GGML_TYPE_BF16;
        });
        add("K 256, V 64, Hadamard 64", policy, [&](rkv_case & c) {
            full(c, 256);
            c.n_embd_v   = 64;
            c.n_hadamard = c.n_hadamard_v = 64;
            c.type_k = GGML_TYPE_Q5_1;
            c.type_v = GGML_TYPE_Q8_0;
        });
        add("K and V 576", policy, [&](rkv_case & c) {
            full(c, 576);
            c.n_rot = 64;
            c.n_head_kv = 1;
            c.n_group = 16;
        });
        add("8 KV heads, group 5", policy, [&](rkv_case & c) { c.n_head_kv = 8; c.n_group = 5; });
        add("window 64", policy, [&](rkv_case & c) { c.window = 64; });
        add("half of the cells pinned", policy, [&](rkv_case & c) { c.pin = 60; });
        add("NaN key", policy, [&](rkv_case & c) { c.nan_key = true; });
        add("transposed V f32", policy, [&](rkv_case & c) { c.v_trans = true; c.type_v = GGML_TYPE_F32; });
        add("transposed V bf16", policy, [&](rkv_case & c) { c.v_trans = true; c.type_v = GGML_TYPE_BF16; });
        add("shorter than the window", policy, [&](rkv_case & c) {
            c.jobs = { { 1, 5, 5, 11, 6, 2, 0, 0x3f }, { 0, 0, 64, 128, 64, 0, 0, 0xff } };
        });
        add("16 sequences", policy, [&](rkv_case & c) {
            c.n_cells  = 96;
            c.n_stream = 17;
            for (int i = 0; i < 16; ++i) {
                c.jobs.push_back({ (i*5 + 1) % 17, i % 3, 64, 96 - (i % 4), 64 - i % 3, 0, 0, 0xff });
            }
        });
        add("one candidate kept", policy, [&](rkv_case & c) { c.jobs = { { 0, 0, 0, 160, 13, 0, 0, 0xff } }; });
        add("no candidate kept", policy, [&](rkv_case & c) { c.jobs = { { 0, 0, 0, 160, 12, 0, 0, 0xff } }; });
        add("8B layer q8_0", policy, [&](rkv_case & c) {
            full(c, 128);
            c.type_k = c.type_v = GGML_TYPE_Q8_0;
            c.n_hadamard = c.n_hadamard_v = 128;
            c.chunk = policy == RKV_POLICY_LAGKV ? 128 : 10;
            c.n_head_kv = 8;
            c.n_group = 4;
            c.n_cells = 1152;
            c.n_stream = 2;
            c.jobs = { { 1, 0, 1024, 1152, 1024, 0, 0, 0xff }, { 0, 0, 0, 1100, 1024, 0, 0, 0xff } };
        });
    }
    add("values alike", RKV_POLICY_VALUE_AWARE, [&](rkv_case & c) { c.same_values = true; c.value_share = 0.5f; });
    add("values alike", RKV_POLICY_LAGKV, [&](rkv_case & c) { c.same_values = true; });
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        add(std::string("values ") + ggml_type_name(type), RKV_POLICY_LATEST, [&](rkv_case & c) {
            c.value_weight = 0.2f;
            c.type_v = type;
            c.n_hadamard_v = type == GGML_TYPE_Q8_0 ? 64 : 0;
        });
    }
    for (const int n_embd_v : { 64, 80, 192, 256, 512 }) {
        add("values of " + std::to_string(n_embd_v), RKV_POLICY_LATEST, [&](rkv_case & c) { c.value_weight = 0.2f; c.n_embd_v = n_embd_v; });
    }
    add("values, transposed", RKV_POLICY_LATEST, [&](rkv_case & c) { c.value_weight = 1.0f; c.v_trans = true; });
    add("values alike", RKV_POLICY_LATEST, [&](rkv_case & c) { c.value_weight = 0.5f; c.same_values = true; });
    add("values, ragged", RKV_POLICY_LATEST, [&](rkv_case & c) {
        c.value_weight = 0.2f;
        c.jobs = { { 2, 0, 70, 160, 70, 0, 0, 0xff }, { 1, 13, 13, 150, 70, 4, 0, 0x3c }, { 0, 4, 100, 101, 93, 4, 0, 0x01 } };
    });
    add("values, memory", RKV_POLICY_LATEST, [&](rkv_case & c) { c.value_weight = 0.2f; c.memory = 0.5f; });
    add("values, 8B layer q8_0", RKV_POLICY_LATEST, [&](rkv_case & c) {
        full(c, 128);
        c.value_weight = 0.2f;
        c.type_k = c.type_v = GGML_TYPE_Q8_0;
        c.n_hadamard = c.n_hadamard_v = 128;
        c.n_head_kv = 8;
        c.n_group = 4;
        c.n_cells = 1152;
        c.n_stream = 2;
        c.jobs = { { 1, 0, 1024, 1152, 1024, 0, 0, 0xff }, { 0, 0, 0, 1100, 1024, 0, 0, 0xff } };
    });
    add("another seed", RKV_POLICY_VALUE_AWARE, [&](rkv_case & c) { c.seed = 0x9abcdef1u; c.layer = 31; });
    for (const float lambda : { 0.0f, 1.0f }) {
        add("lambda " + std::to_string(lambda).substr(0, 3), RKV_POLICY_GKV, [&](rkv_case & c) { c.lambda = lambda; });
    }
    add("pool 7, threshold 0.80", RKV_POLICY_GKV, [&](rkv_case & c) { c.pool = 7; c.threshold = 0.8f; });
    for (const int policy : { RKV_POLICY_RKV, RKV_POLICY_SNAPKV, RKV_POLICY_LATEST, RKV_POLICY_GKV }) {
        add("memory, ragged", policy, [&](rkv_case & c) {
            c.memory = 1.0f;
            c.jobs = { { 2, 0, 70, 160, 70, 0, 0, 0xff }, { 1, 13, 13, 150, 70, 4, 0, 0x3c }, { 0, 4, 100, 101, 93, 4, 0, 0x01 } };
        });
    }
    add("memory of 5 floats", RKV_POLICY_LATEST, [&](rkv_case & c) { c.memory = 0.5f; c.n_sim = 4; });
    for (const bool neox : { false, true }) {
        const std::string kind = neox ? " neox" : " normal";
        add("rope" + kind, RKV_POLICY_TRIATTENTION, [&](rkv_case & c) { c.neox = neox; });
        add("rope q8_0 Hadamard 64" + kind, RKV_POLICY_TRIATTENTION, [&](rkv_case & c) {
            c.neox = neox;
            c.n_hadamard = 64;
            c.type_k = GGML_TYPE_Q8_0;
            full(c, 192);
        });
    }
    add("no rope", RKV_POLICY_TRIATTENTION, [&](rkv_case & c) { c.n_rot = 0; });

    for (const int chunk : { 1, 7, 64, 500 }) {
        add("chunk " + std::to_string(chunk), RKV_POLICY_CHUNKKV, [&](rkv_case & c) { c.chunk = chunk; });
        add("chunk " + std::to_string(chunk), RKV_POLICY_LAGKV, [&](rkv_case & c) { c.chunk = chunk; });
    }
    for (const float share : { 0.0f, 0.5f, 1.0f }) {
        add("share " + std::to_string(share).substr(0, 3), RKV_POLICY_VALUE_AWARE, [&](rkv_case & c) { c.value_share = share; c.seed = 9; });
    }
    for (const int pool : { 1, 15 }) {
        add("pool " + std::to_string(pool), RKV_POLICY_RPC, [&](rkv_case & c) { c.pool = pool; });
    }
    add("no memory", RKV_POLICY_GKV, [&](rkv_case & c) { c.memory = 0.0f; });
    for (const bool neox : { false, true }) {
        add(neox ? "rope half neox" : "rope half", RKV_POLICY_TRIATTENTION, [&](rkv_case & c) { c.neox = neox; c.n_rot = 32; c.mscale = 1.37f; });
    }
    for (const int policy : { RKV_POLICY_RKV, RKV_POLICY_SNAPKV, RKV_POLICY_LATEST }) {
        add("memory", policy, [&](rkv_case & c) { c.memory = 0.9f; });
    }

    // sizes of real use
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int policy : every) {
            add(std::string("8B layer ") + ggml_type_name(type), policy, [&](rkv_case & c) {
                full(c, 128);
                c.type_k = c.type_v = type;
                c.n_hadamard = type == GGML_TYPE_Q8_0 ? 128 : 0;
                c.n_head_kv = 8;
                c.n_group = 4;
                c.n_cells = 1152;
                c.n_stream = 2;
                c.jobs = { { 1, 0, 1024, 1152, 1024, 0, 0, 0xff }, { 0, 0, 0, 1100, 1024, 0, 0, 0xff } };
            });
        }
    }
    for (const int policy : scored) {
        add("long prompt", policy, [&](rkv_case & c) {
            c.n_cells = 3072;
            c.n_stream = 1;
            c.jobs = { { 0, 0, 1024, 3072, 1024, 0, 0, 0xff } };
        });
    }
    return all;
}

const std::vector<rkv_case> & rkv_cases() {
    static const std::vector<rkv_case> cases = make_cases();
    return cases;
}

bool rkv_case_is_optional(const rkv_case & c) { return c.policy > RKV_POLICY_LATEST || c.memory > 0.0f; }

rkv_op_params rkv_case_params(const rkv_case & c) {
    rkv_op_params p = {};
    p.policy      = c.policy;
    p.n_head_kv   = c.n_head_kv;
    p.window      = c.window;
    p.pool        = c.pool;
    p.n_sim       = c.n_sim;
    p.flags       = (c.reference ? RKV_FLAG_REFERENCE : 0) | (c.neox ? RKV_FLAG_ROPE_NEOX : 0);
    p.n_hadamard  = c.n_hadamard;
    p.n_rot       = c.n_rot;
    p.lambda      = c.lambda;
    p.threshold   = c.threshold;
    p.scale       = 1.0f/std::sqrt((float) c.n_embd_k);
    p.softcap     = c.softcap;
    p.rope_mscale = c.mscale;
    p.n_hadamard_v = c.n_hadamard_v;
    p.chunk       = c.chunk;
    p.layer       = c.layer;
    p.seed        = c.seed;
    p.memory      = c.memory;
    p.value_share = c.value_share;
    p.value_weight = c.value_weight;
    return p;
}

rkv_op_params rkv_case_select(const rkv_case & c) {
    rkv_op_params p = rkv_case_params(c);
    p.window = std::max(c.recent, c.window);
    return p;
}

//
// inputs
//

// as RoPE does it, in double precision
static void rotate(const rkv_case & c, std::vector<float> & x, int pos) {
    const int half = c.n_rot/2;
    for (int i = 0; i < half; ++i) {
        const double angle = pos*std::pow(10000.0, -2.0*i/c.n_rot);
        const double cs = std::cos(angle)*c.mscale, sn = std::sin(angle)*c.mscale;
        float & x0 = c.neox ? x[i]        : x[2*i];
        float & x1 = c.neox ? x[i + half] : x[2*i + 1];
        const double y0 = x0*cs - x1*sn, y1 = x0*sn + x1*cs;
        x0 = (float) y0;
        x1 = (float) y1;
    }
}

static void store(ggml_type type, const std::vector<float> & x, uint8_t * dst) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, x.data(), x.size()*sizeof(float));
    } else {
        ggml_quantize_chunk(type, x.data(), dst, 0, 1, x.size(), nullptr);
    }
}

rkv_case_data rkv_case_inputs(const rkv_case & c) {
    std::mt19937 rng(11);
    std::normal_distribution<float> normal;
    const auto below = [&](int n) { return (int) (rng() % n); };

    rkv_case_data d;
    const int n_job = c.jobs.size();
    d.n_new = c.n_cells;
    for (const auto & j : c.jobs) {
        d.n_new      = std::max(d.n_new, c.n_cells + j.shift);
        d.n_keep_max = std::max(d.n_keep_max, j.keep);
    }

    // positions: every third token or so survived the earlier passes, which ones differs between heads
    std::vector<int32_t> true_pos((size_t) c.n_cells*c.n_head_kv*c.n_stream);
    d.pos.assign(true_pos.size(), -1);
    d.new_pos.assign((size_t) d.n_new*n_job, -1);
    const auto at_pos = [&](int j, int h, int s) { return ((size_t) s*c.n_head_kv + h)*c.n_cells + j; };
    for (int i = 0; i < n_job; ++i) {
        const auto & job = c.jobs[i];
        GGML_ASSERT(job.dst <= job.begin && job.keep >= std::min(job.end - job.begin, c.window + c.pin));
        const int next = 5*(job.old_end - job.begin) + 3; // position of the first new token
        for (int h = 0; h < c.n_head_kv; ++h) {
            int p = 0;
            for (int j = job.begin; j < job.end; ++j) {
                p += j < job.old_end ? 1 + below(5) : 0;
                true_pos[at_pos(j, h, job.stream)] = j < job.old_end ? p : next + j - job.old_end;
                if (j < job.old_end) {
                    d.pos[at_pos(j, h, job.stream)] = p;
                }
            }
        }
        for (int j = job.old_end; j < job.end; ++j) {
            d.new_pos[(size_t) i*d.n_new + j + job.shift] = next + j - job.old_end;
        }
        const int32_t column[RKV_JOB_N] = { job.stream, job.begin, job.old_end, job.end, job.keep, job.dst, job.shift,
            (int32_t) (uint32_t) job.slots, (int32_t) (uint32_t) (job.slots >> 32), c.pin };
        d.jobs.insert(d.jobs.end(), column, column + RKV_JOB_N);
    }

    // keys: noise, exact copies, and facts that come back with some noise
    const size_t head_k = ggml_row_size(c.type_k, c.n_embd_k), row_k = head_k*c.n_head_kv;
    d.k.resize(row_k*c.n_cells*c.n_stream);
    std::vector<std::vector<float>> facts(9, std::vector<float>(c.n_embd_k));
    for (auto & f : facts) {
        for (auto & x : f) {
            x = normal(rng);
        }
    }
    std::vector<float> key(c.n_embd_k), last(c.n_embd_k, 0.0f);
    for (int s = 0; s < c.n_stream; ++s) {
        for (int j = 0; j < c.n_cells; ++j) {
            for (int h = 0; h < c.n_head_kv; ++h) {
                const int   kind   = below(10);
                const float length = 0.5f + 0.25f*below(5);
                const auto & fact  = facts[below(facts.size())];
                for (int i = 0; i < c.n_embd_k; ++i) {
                    key[i] = kind < 5 ? length*normal(rng) : kind < 9 ? length*(fact[i] + 0.5f*normal(rng)) : last[i];
                }
                if (j % 41 == 7) {
                    std::fill(key.begin(), key.end(), 0.0f);
                }
                last = key;
                if (c.nan_key && s == c.jobs[0].stream && h == 0 && j == c.jobs[0].begin + c.pin + 3) {
                    key[5] = NAN;
                }
                if (c.n_rot > 0) {
                    rotate(c, key, true_pos[at_pos(j, h, s)]);
                }
                for (int i = 0; c.n_hadamard > 0 && i < c.n_embd_k; i += c.n_hadamard) {
                    rkv_hadamard(key.data() + i, c.n_hadamard);
                }
                store(c.type_k, key, d.k.data() + ((size_t) s*c.n_cells + j)*row_k + h*head_k);
            }
        }
    }

    d.v.resize(ggml_row_size(c.type_v, c.n_embd_v)*c.n_head_kv*c.n_cells*c.n_stream);
    if (!values_of(c)) {
        for (auto & x : d.v) {
            x = (uint8_t) rng(); // bytes are only moved
        }
    }
    for (int i = 0; values_of(c) && i < c.n_stream*c.n_cells*c.n_head_kv; ++i) {
        const int h = i % c.n_head_kv, j = i/c.n_head_kv % c.n_cells, s = i/c.n_head_kv/c.n_cells;
        std::vector<float> value(c.n_embd_v);
        const float length = std::exp(normal(rng));
        for (auto & x : value) {
            x = length*normal(rng);
        }
        for (int e = 0; c.same_values && e < c.n_embd_v; ++e) {
            value[e] = 0.25f*(e % 7);
        }
        const size_t stream = d.v.size()/c.n_stream, head = ggml_row_size(c.type_v, c.n_embd_v), el = ggml_type_size(c.type_v);
        if (!c.v_trans) {
            store(c.type_v, value, d.v.data() + s*stream + (size_t) (j*c.n_head_kv + h)*head);
        }
        for (int e = 0; c.v_trans && e < c.n_embd_v; ++e) {
            store(c.type_v, { value[e] }, d.v.data() + s*stream + ((size_t) (h*c.n_embd_v + e)*c.n_cells + j)*el);
        }
    }

    d.q.resize((size_t) c.n_embd_k*c.n_head_kv*c.n_group*(c.window + 1)*c.n_stream);
    for (size_t i = 0; i < d.q.size(); i += c.n_embd_k) {
        const auto & fact = facts[below(facts.size())];
        for (int x = 0; x < c.n_embd_k; ++x) {
            d.q[i + x] = normal(rng) + 0.2f*fact[x];
        }
    }

    const rkv_op_params par = rkv_case_params(c);
    if (rkv_n_aux(&par) > 0) {
        d.aux.assign(d.pos.size()*c.n_aux, c.policy == RKV_POLICY_GIVEN ? 0.0f : NAN); // new cells' floats hold nothing yet
        for (size_t i = 0; i < d.pos.size(); ++i) {
            float top = 0.9f;
            const bool known = d.pos[i] >= 0 || c.policy == RKV_POLICY_GIVEN;
            for (int s = 0; known && s < (c.policy == RKV_POLICY_LATEST ? c.n_sim : 1); ++s) {
                top -= 0.001f*below(400);
                d.aux[i*c.n_aux + s] = top;
            }
            if (known && c.policy == RKV_POLICY_LATEST && c.memory > 0.0f) {
                d.aux[i*c.n_aux + c.n_sim] = 0.0001f*below(400);
            }
        }
    }
    if (c.n_rot > 0 && rkv_needs_rope(c.policy)) {
        const int32_t last_pos = *std::max_element(true_pos.begin(), true_pos.end());
        const int32_t ahead    = c.policy == RKV_POLICY_TRIATTENTION ? 1 << (RKV_TRI_OFFSETS - 1) : 0;
        d.rope = rkv_rope_table({ c.n_rot, 0, 10000.0f, 1.0f, 0.0f, c.mscale, 32.0f, 1.0f, nullptr }, last_pos + 1 + ahead);
    }
    const int64_t n_stats = rkv_n_stats(&par, c.n_embd_k);
    if (n_stats > 0) {
        for (int i = 0; i < c.n_stream*c.n_head_kv*c.n_group; ++i) {
            for (int e = 0; e < n_stats; ++e) {
                const float x = normal(rng);
                d.stats.push_back(e == n_stats - 1 ? 24.0f : e < c.n_embd_k ? 0.3f*x : 1.0f + std::fabs(x));
            }
        }
        for (const auto & job : c.jobs) {
            const int last = true_pos[at_pos(job.end - 1, 0, job.stream)];
            for (int slot = 0; slot < c.window; ++slot) {
                d.q_pos.push_back(std::max(-1, last - ((last - slot) % c.window + c.window) % c.window));
            }
        }
    }
    return d;
}

//
// running
//

std::vector<ggml_tensor *> rkv_case_moved(ggml_context * ctx, const rkv_case & c, const rkv_case_tensors & t) {
    const auto rows = [&](ggml_tensor * x, int64_t n_embd) {
        return ggml_view_4d(ctx, x, n_embd, x->ne[1], c.n_head_kv, x->ne[2], x->nb[1], ggml_row_size(x->type, n_embd), x->nb[2], 0);
    };
    const auto columns = [&](ggml_tensor * x, int64_t n_line) {
        const size_t el = ggml_type_size(x->type);
        return ggml_view_4d(ctx, x, 1, c.n_cells, n_line, x->ne[2], el, el*c.n_cells, x->nb[2], 0);
    };
    std::vector<ggml_tensor *> res = { rows(t.k, c.n_embd_k) };
    if (t.v) {
        res.push_back(c.v_trans ? columns(t.v, (int64_t) c.n_embd_v*c.n_head_kv) : rows(t.v, c.n_embd_v));
    }
    res.push_back(columns(t.pos, c.n_head_kv));
    if (t.aux) {
        res.push_back(t.aux);
    }
    return res;
}

ggml_tensor * rkv_case_score(ggml_context * ctx, const rkv_case & c, const rkv_case_tensors & t, ggml_tensor * pos) {
    const rkv_op_params par = rkv_case_params(c);
    ggml_tensor * z = ggml_rkv_score(ctx, t.k, t.q, t.jobs, pos, t.aux, t.rope, &par);
    if (values_of(c)) {
        const size_t el = ggml_type_size(t.v->type), line = el*c.n_cells, head = ggml_row_size(t.v->type, c.n_embd_v);
        ggml_tensor * v = c.v_trans ?
            ggml_view_4d(ctx, t.v, c.n_embd_v, c.n_cells, c.n_head_kv, c.n_stream, el, line*c.n_embd_v, t.v->nb[2], 0) :
            ggml_view_4d(ctx, t.v, c.n_embd_v, c.n_cells, c.n_head_kv, c.n_stream, t.v->nb[1], head, t.v->nb[2], 0);
        v->nb[0] = c.v_trans ? line : el;
        ggml_rkv_score_add_values(z, v);
    }
    if (t.stats) {
        ggml_rkv_score_add_stats(z, t.stats, t.q_pos);
    }
    return z;
}

void rkv_case_build(ggml_context * ctx, ggml_cgraph * gf, const rkv_case & c, const rkv_case_data & d, rkv_case_tensors & t) {
    const rkv_op_params par = rkv_case_params(c), select = rkv_case_select(c);
    ggml_tensor * pos = ggml_rkv_positions(ctx, t.pos, t.new_pos, t.jobs, &par);
    ggml_build_forward_expand(gf, pos);
    t.score = rkv_case_score(ctx, c, t, pos);
    t.idx   = ggml_rkv_select(ctx, t.score, t.jobs, d.n_keep_max, &select);
    ggml_build_forward_expand(gf, t.idx);
    for (ggml_tensor * view : rkv_case_moved(ctx, c, t)) {
        ggml_build_forward_expand(gf, ggml_rkv_compact(ctx, view, t.idx, t.jobs, &par));
    }
}

void rkv_case_set(const rkv_case_tensors & t, const rkv_case_data & d) {
    const auto set = [](ggml_tensor * x, const auto & data) {
        if (x) {
            GGML_ASSERT(ggml_nbytes(x) == data.size()*sizeof(data[0]));
            ggml_backend_tensor_set(x, data.data(), 0, ggml_nbytes(x));
        }
    };
    set(t.k, d.k);
    set(t.v, d.v);
    set(t.q, d.q);
    set(t.pos, d.pos);
    set(t.new_pos, d.new_pos);
    set(t.jobs, d.jobs);
    set(t.aux, d.aux);
    set(t.rope, d.rope);
    set(t.stats, d.stats);
    set(t.q_pos, d.q_pos);
}

rkv_case_result rkv_case_run(ggml_backend_t backend, const rkv_case & c, const rkv_case_data & d, const rkv_case_builder & build) {
    rkv_case_result r;
    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*RKV_CASE_NODES + ggml_graph_overhead_custom(RKV_CASE_NODES, false), nullptr, true }) };
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), RKV_CASE_NODES, false);

    rkv_case_tensors t;
    t.k = ggml_new_tensor_3d(ctx.get(), c.type_k, (int64_t) c.n_embd_k*c.n_head_kv, c.n_cells, c.n_stream);
    if (c.n_embd_v > 0) {
        t.v = ggml_new_tensor_3d(ctx.get(), c.type_v, (int64_t) c.n_embd_v*c.n_head_kv, c.n_cells, c.n_stream);
    }
    t.q       = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, (int64_t) c.n_embd_k*c.n_head_kv*c.n_group, c.window + 1, c.n_stream);
    t.pos     = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, c.n_cells, c.n_head_kv, c.n_stream);
    t.new_pos = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, d.n_new, c.jobs.size());
    t.jobs    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, c.jobs.size());
    if (!d.aux.empty()) {
        t.aux = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, c.n_aux, c.n_cells, c.n_head_kv, c.n_stream);
    }
    if (!d.rope.empty()) {
        t.rope = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, c.n_rot, d.rope.size()/c.n_rot);
    }
    if (!d.stats.empty()) {
        const int64_t n_head = c.n_head_kv*c.n_group;
        t.stats = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d.stats.size()/n_head/c.n_stream, n_head, c.n_stream);
        t.q_pos = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, c.window, c.jobs.size());
    }
    build(ctx.get(), gf, c, d, t);

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            r.error = std::string("not supported: ") + ggml_op_desc(ggml_graph_node(gf, i));
            return r;
        }
    }
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
    if (!buf) {
        r.error = "out of memory";
        return r;
    }
    ggml_backend_buffer_clear(buf.get(), 0xa5); // unwritten outputs must not pass for zeros

    rkv_case_set(t, d);
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        r.error = "failed to compute";
        return r;
    }
    rkv_case_get(t.score, r.score);
    rkv_case_get(t.idx, r.idx);
    rkv_case_get(t.k, r.k);
    rkv_case_get(t.v, r.v);
    rkv_case_get(t.pos, r.pos);
    rkv_case_get(t.aux, r.aux);
    rkv_case_get(t.stats, r.stats);
    return r;
}

//
// comparing
//

static std::string text(const char * fmt, ...) {
    char buf[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(buf, sizeof(buf), fmt, args);
    va_end(args);
    return buf;
}

// rows to keep of one job and head; "" or what is wrong with `got`
static std::string compare_rows(const rkv_case & c, const rkv_case_job & job, const int32_t * want, const int32_t * got, const float * z) {
    const int n = job.end - job.begin, n_keep = std::min(job.keep, n);
    for (int r = 0; r < n_keep; ++r) {
        if (got[r] < job.begin || got[r] >= job.end || (r > 0 && got[r] <= got[r - 1])) {
            return text("row %d of the kept is %d", r, got[r]);
        }
    }
    std::vector<int32_t> lost, won;
    std::set_difference(want, want + n_keep, got, got + n_keep, std::back_inserter(lost));
    std::set_difference(got, got + n_keep, want, want + n_keep, std::back_inserter(won));
    for (const int32_t row : lost) {
        for (const int32_t other : won) {
            const int   a = row - job.begin, b = other - job.begin;
            const bool  forced = std::min(a, b) < c.pin || std::max(a, b) >= n - std::max(c.recent, c.window);
            const float za = forced ? INFINITY : z[a], zb = z[b];
            if (!(std::fabs(za - zb) <= 1e-6f*std::max(std::fabs(za), std::fabs(zb)))) {
                return text("row %d (%.9g) is not kept, row %d (%.9g) is", row, za, other, zb);
            }
        }
    }
    return "";
}

static std::string compare_scores(const rkv_case & c, const rkv_case_job & job, const float * want, const float * got) {
    const int n_cand = job.end - job.begin - c.window;
    // what is kept in any case lies far above, and is compared by itself
    const auto above = [&](int j) {
        return (c.policy == RKV_POLICY_VALUE_AWARE && want[j] == RKV_KEPT_SCORE) || (c.policy == RKV_POLICY_LAGKV && want[j] >= 2.0f);
    };
    float top = 0.0f;
    for (int j = 0; j < n_cand; ++j) {
        top = std::max(top, above(j) ? 0.0f : std::fabs(want[j]));
    }
    for (int j = 0; j < n_cand; ++j) {
        const bool same = std::isnan(want[j]) ? std::isnan(got[j]) :
            std::fabs(want[j] - got[j]) <= (above(j) ? 5e-7f*want[j] : 2e-5f*top);
        if (!same) {
            return text("score %d is %.9g, not %.9g", j, got[j], want[j]);
        }
    }
    return "";
}

// what a tensor must hold after its units were gathered by `idx`
static std::vector<uint8_t> gathered(const rkv_case & c, const rkv_case_data & d, const std::vector<uint8_t> & before, size_t unit,
        size_t step, size_t line, int n_line, const std::vector<int32_t> & idx) {
    std::vector<uint8_t> after = before;
    const size_t stream = before.size()/c.n_stream;
    for (size_t i = 0; i < c.jobs.size(); ++i) {
        const auto & job = c.jobs[i];
        for (int l = 0; l < n_line; ++l) {
            const int32_t * rows = idx.data() + (i*c.n_head_kv + (size_t) l*c.n_head_kv/n_line)*d.n_keep_max;
            const size_t base = job.stream*stream + l*line;
            for (int r = 0; r < std::min(job.keep, job.end - job.begin); ++r) {
                memcpy(after.data() + base + (job.dst + r)*step, before.data() + base + rows[r]*step, unit);
            }
        }
    }
    return after;
}

std::string rkv_case_compare(const rkv_case & c, const rkv_case_data & d, const rkv_case_result & want, const rkv_case_result & got) {
    if (!want.error.empty() || !got.error.empty()) {
        return want.error.empty() ? got.error : "the reference: " + want.error;
    }
    for (size_t i = 0; i < c.jobs.size(); ++i) {
        for (int h = 0; h < c.n_head_kv; ++h) {
            const size_t at = (i*c.n_head_kv + h)*d.n_keep_max, at_z = (i*c.n_head_kv + h)*c.n_cells;
            std::string err;
            if (!got.score.empty()) {
                err = compare_scores(c, c.jobs[i], want.score.data() + at_z, got.score.data() + at_z);
            }
            if (err.empty()) {
                err = compare_rows(c, c.jobs[i], want.idx.data() + at, got.idx.data() + at, want.score.data() + at_z);
            }
            if (!err.empty()) {
                return text("job %zu head %d: ", i, h) + err;
            }
        }
    }

    const size_t head_k = ggml_row_size(c.type_k, c.n_embd_k), head_v = ggml_row_size(c.type_v, c.n_embd_v);
    if (got.k != gathered(c, d, d.k, head_k, head_k*c.n_head_kv, head_k, c.n_head_kv, got.idx)) {
        return "the bytes of K";
    }
    const size_t el = ggml_type_size(c.type_v);
    if (c.n_embd_v > 0 && got.v != (c.v_trans ? gathered(c, d, d.v, el, el, el*c.n_cells, c.n_embd_v*c.n_head_kv, got.idx) :
            gathered(c, d, d.v, head_v, head_v*c.n_head_kv, head_v, c.n_head_kv, got.idx))) {
        return "the bytes of V";
    }

    std::vector<int32_t> pos = d.pos;
    for (size_t i = 0; i < c.jobs.size(); ++i) {
        const auto & job = c.jobs[i];
        for (int h = 0; h < c.n_head_kv; ++h) {
            for (int j = job.old_end; j < job.end; ++j) {
                pos[((size_t) job.stream*c.n_head_kv + h)*c.n_cells + j] = d.new_pos[i*d.n_new + j + job.shift];
            }
        }
    }
    std::vector<uint8_t> bytes((const uint8_t *) pos.data(), (const uint8_t *) (pos.data() + pos.size()));
    bytes = gathered(c, d, bytes, sizeof(int32_t), sizeof(int32_t), sizeof(int32_t)*c.n_cells, c.n_head_kv, got.idx);
    if (memcmp(bytes.data(), got.pos.data(), bytes.size()) != 0) {
        return "the positions";
    }

    // a kept row's floats, wherever the two put it
    std::vector<bool> touched(c.n_stream, false);
    for (size_t i = 0; !d.aux.empty() && i < c.jobs.size(); ++i) {
        const auto & job = c.jobs[i];
        touched[job.stream] = true;
        for (int h = 0; h < c.n_head_kv; ++h) {
            const int32_t * a = want.idx.data() + (i*c.n_head_kv + h)*d.n_keep_max;
            const int32_t * b = got.idx.data()  + (i*c.n_head_kv + h)*d.n_keep_max;
            const size_t base = ((size_t) job.stream*c.n_head_kv + h)*c.n_cells + job.dst;
            const int n_keep = std::min(job.keep, job.end - job.begin);
            for (int ra = 0, rb = 0; ra < n_keep && rb < n_keep;) {
                if (a[ra] != b[rb]) {
                    a[ra] < b[rb] ? ++ra : ++rb;
                    continue;
                }
                const rkv_op_params par = rkv_case_params(c);
                for (int s = 0; s < rkv_n_aux(&par); ++s) {
                    const float x = want.aux[(base + ra)*c.n_aux + s], y = got.aux[(base + rb)*c.n_aux + s];
                    if (!(std::fabs(x - y) <= 1e-5f || (std::isnan(x) && std::isnan(y)))) {
                        return text("job %zu head %d: float %d of row %d is %.9g, not %.9g", i, h, s, a[ra], y, x);
                    }
                }
                ++ra;
                ++rb;
            }
        }
    }
    for (size_t i = 0; i < d.stats.size(); ++i) {
        const float x = want.stats[i], y = got.stats.size() == d.stats.size() ? got.stats[i] : NAN;
        if (!(std::fabs(x - y) <= 1e-4f*std::max(1.0f, std::fabs(x)))) {
            return text("statistic %zu is %.9g, not %.9g", i, y, x);
        }
    }
    const size_t stream = d.aux.size()/c.n_stream;
    for (int s = 0; s < c.n_stream; ++s) {
        if (!touched[s] && stream > 0 && memcmp(d.aux.data() + s*stream, got.aux.data() + s*stream, stream*sizeof(float)) != 0) {
            return text("the floats of stream %d, which was not compacted", s);
        }
    }
    return "";
}
