// The selection by itself: the same ops on the CPU backend, over arrays that the caller brings.

#include "rkv-cache.h"
#include "rkv-init.h"
#include "rkv-unrotate.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

static rkv_rope rope_of(const rkv_select_args & a) {
    return { a.rope_n_rot, a.rope_n_ctx_orig, a.rope_freq_base, a.rope_freq_scale, a.rope_ext_factor, a.rope_attn_factor,
             a.rope_beta_fast, a.rope_beta_slow, a.rope_freq_factors };
}

static rkv_op_params op_of(const rkv_select_args & a) {
    rkv_op_params op = rkv_policy_op(a.params);
    op.layer       = a.layer;
    op.value_weight = op.policy == RKV_POLICY_LATEST && !a.v ? 0.0f : op.value_weight;
    op.n_head_kv   = a.n_head_kv;
    op.flags       = op.flags | (a.rope_neox ? RKV_FLAG_ROPE_NEOX : 0);
    op.n_rot       = a.rope_n_rot;
    op.scale       = a.scale;
    op.softcap     = a.softcap;
    op.rope_mscale = a.rope_n_rot > 0 ? rkv_rope_mscale(a.rope_freq_scale, a.rope_ext_factor, a.rope_attn_factor) : 1.0f;
    return op;
}

static bool check_rope(const rkv_select_args & a) {
    if (a.rope_n_rot < 0 || a.rope_n_rot % 2 || a.rope_n_rot > a.n_embd_head) {
        return rkv_set_error("rope_n_rot must be even and at most %d, not %d", a.n_embd_head, a.rope_n_rot);
    }
    if (a.rope_n_rot > 0 && (!(a.rope_freq_base > 0.0f) || !(a.rope_freq_scale > 0.0f) || a.rope_attn_factor == 0.0f)) {
        return rkv_set_error("the RoPE frequencies must be positive");
    }
    if (!a.pos) {
        return a.rope_n_rot == 0 || rkv_set_error("positions are missing");
    }
    const int32_t * end = a.pos + (size_t) a.n*a.n_head_kv;
    return std::all_of(a.pos, end, [](int32_t p) { return p >= 0 && p < 1 << 24; }) ||
        rkv_set_error("positions must be 0 to %d", (1 << 24) - 1);
}

static bool is_cached_as(int32_t type, int32_t n_embd) {
    static const int32_t types[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
        GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL };
    return std::find(std::begin(types), std::end(types), type) != std::end(types) && n_embd % ggml_blck_size((ggml_type) type) == 0;
}

// [n_head_kv*n_embd, n] floats as a cache of this type holds them
static void store(ggml_tensor * t, const float * src, int64_t n_row, int64_t n_embd) {
    std::vector<uint8_t> stored(ggml_nbytes(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(stored.data(), src, stored.size());
    } else {
        ggml_quantize_chunk(t->type, src, stored.data(), 0, n_row, n_embd, nullptr);
    }
    ggml_backend_tensor_set(t, stored.data(), 0, stored.size());
}

static bool check(const rkv_select_args & a) {
    if (!rkv_params_check(&a.params)) {
        return false;
    }
    if (a.params.policy == RKV_POLICY_NONE || a.params.layer_budgets) {
        return rkv_set_error("a selection takes one budget and a policy other than none");
    }
    if (a.n < 1 || a.n_head_kv < 1 || a.n_head < 1 || a.n_head % a.n_head_kv || a.n_embd_head < 1 || a.n_old < 0 || a.n_old > a.n) {
        return rkv_set_error("sizes are inconsistent: n %d, n_head_kv %d, n_head %d, n_embd_head %d, n_old %d",
            a.n, a.n_head_kv, a.n_head, a.n_embd_head, a.n_old);
    }
    if (!a.k || !a.q) {
        return rkv_set_error("keys or queries are missing");
    }
    if (!is_cached_as(a.type_k, a.n_embd_head)) {
        return rkv_set_error("keys of length %d cannot be cached as type %d", a.n_embd_head, a.type_k);
    }
    const rkv_op_params op = op_of(a);
    if (rkv_needs_values(&op) || a.params.value_weight > 0.0f) {
        if (!a.v) {
            return rkv_set_error("values are missing: the policy %s looks at them", rkv_policy_name(a.params.policy));
        }
        if (a.n_embd_head_v < 1 || !is_cached_as(a.type_v, a.n_embd_head_v)) {
            return rkv_set_error("values of length %d cannot be cached as type %d", a.n_embd_head_v, a.type_v);
        }
    }
    if (rkv_needs_rope(a.params.policy) && !a.pos) {
        return rkv_set_error("positions are missing");
    }
    return check_rope(a);
}

int32_t rkv_select(const rkv_select_args * args, int32_t * idx, float * score) {
    if (!args || !idx || !check(*args)) {
        if (!args || !idx) {
            rkv_set_error("arguments are missing");
        }
        return -1;
    }
    const rkv_select_args & a = *args;
    const rkv_op_params    op = op_of(a);
    const int64_t n_keep   = std::min<int64_t>(a.params.budget, a.n);
    const int64_t n_window = a.params.window;
    const int64_t n_aux    = rkv_n_aux(&op), n_stats = rkv_n_stats(&op, a.n_embd_head);
    const bool    values   = rkv_needs_values(&op);

    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    if (!ctx || !backend) {
        rkv_set_error("failed to initialize the CPU backend");
        return -1;
    }
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    if (auto * fn = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        fn(backend.get(), std::max(1, a.n_threads));
    }

    const auto type = (ggml_type) a.type_k;
    ggml_tensor * k    = ggml_new_tensor_3d(ctx.get(), type, (int64_t) a.n_embd_head*a.n_head_kv, a.n, 1);
    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, (int64_t) a.n_embd_head*a.n_head, n_window + 1, 1);
    ggml_tensor * pos  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, a.n, a.n_head_kv, 1);
    ggml_tensor * jobs = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
    ggml_tensor * aux  = n_aux > 0 ? ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, n_aux, a.n, a.n_head_kv, 1) : nullptr;
    ggml_tensor * v     = values ? ggml_new_tensor_3d(ctx.get(), (ggml_type) a.type_v, (int64_t) a.n_embd_head_v*a.n_head_kv, a.n, 1) : nullptr;
    ggml_tensor * stats = n_stats > 0 ? ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_stats, a.n_head, 1) : nullptr;
    ggml_tensor * q_pos = n_stats > 0 ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_window, 1) : nullptr;
    ggml_tensor * rope  = nullptr;
    std::vector<float> table;
    if (op.n_rot > 0 && rkv_needs_rope(op.policy)) {
        const int32_t ahead = op.policy == RKV_POLICY_TRIATTENTION ? 1 << (RKV_TRI_OFFSETS - 1) : 0;
        table = rkv_rope_table(rope_of(a), 1 + ahead + *std::max_element(a.pos, a.pos + (size_t) a.n*a.n_head_kv));
        rope  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, op.n_rot, table.size()/op.n_rot);
    }
    ggml_tensor * z   = ggml_rkv_score (ctx.get(), k, q, jobs, pos, aux, rope, &op);
    if (values) {
        ggml_rkv_score_add_values(z, ggml_view_4d(ctx.get(), v, a.n_embd_head_v, a.n, a.n_head_kv, 1, v->nb[1],
            ggml_row_size(v->type, a.n_embd_head_v), v->nb[2], 0));
    }
    if (stats) {
        ggml_rkv_score_add_stats(z, stats, q_pos);
    }
    rkv_op_params select = op;
    select.window = rkv_recent(a.params, a.params.budget);
    ggml_tensor * sel = ggml_rkv_select(ctx.get(), z, jobs, n_keep, &select);
    ggml_cgraph * gf  = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, sel);

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        rkv_set_error("failed to allocate memory for the selection");
        return -1;
    }
    ggml_backend_buffer_clear(buf.get(), 0);

    store(k, a.k, (int64_t) a.n*a.n_head_kv, a.n_embd_head);
    if (v) {
        store(v, a.v, (int64_t) a.n*a.n_head_kv, a.n_embd_head_v);
    }
    if (stats) {
        std::vector<int32_t> at(n_window, -1);
        for (int64_t i = std::max<int64_t>(0, n_window - a.n); i < n_window; ++i) {
            at[i] = a.pos[(a.n - n_window + i)*a.n_head_kv];
        }
        ggml_backend_tensor_set(q_pos, at.data(), 0, ggml_nbytes(q_pos));
        if (a.stats) {
            ggml_backend_tensor_set(stats, a.stats, 0, ggml_nbytes(stats));
        }
    }
    ggml_backend_tensor_set(q, a.q, 0, q->nb[1]*n_window);

    std::vector<int32_t> by_head((size_t) a.n*a.n_head_kv, 0);
    for (int64_t h = 0; a.pos && h < a.n_head_kv; ++h) {
        for (int64_t j = 0; j < a.n; ++j) {
            by_head[h*a.n + j] = a.pos[j*a.n_head_kv + h];
        }
    }
    ggml_backend_tensor_set(pos, by_head.data(), 0, ggml_nbytes(pos));
    if (rope) {
        ggml_backend_tensor_set(rope, table.data(), 0, ggml_nbytes(rope));
    }

    // the caller's [n_aux, n, n_head_kv] against the cache's [n_head_kv, n, n_aux]
    const auto at_caller = [&](int64_t s, int64_t j, int64_t h) { return (s*a.n + j)*a.n_head_kv + h; };
    const auto at_cache  = [&](int64_t s, int64_t j, int64_t h) { return (h*a.n + j)*n_aux + s; };
    std::vector<float> stored_aux(aux ? ggml_nelements(aux) : 0, -1.0f);
    const auto each_aux = [&](auto && f) {
        for (int64_t s = 0; s < n_aux; ++s) {
            for (int64_t j = 0; j < a.n; ++j) {
                for (int64_t h = 0; h < a.n_head_kv; ++h) {
                    f(at_caller(s, j, h), at_cache(s, j, h));
                }
            }
        }
    };
    if (aux) {
        if (a.aux) {
            each_aux([&](int64_t from, int64_t to) { stored_aux[to] = a.aux[from]; });
        }
        ggml_backend_tensor_set(aux, stored_aux.data(), 0, ggml_nbytes(aux));
    }

    int32_t job[RKV_JOB_N] = {};
    const uint64_t slots = n_window == 64 ? ~0ull : (1ull << n_window) - 1;
    const bool forgot = (aux && !a.aux && op.policy != RKV_POLICY_LATEST) || (stats && !a.stats);
    job[RKV_JOB_OLD_END]  = forgot ? 0 : a.n_old;
    job[RKV_JOB_END]      = a.n;
    job[RKV_JOB_KEEP]     = n_keep;
    job[RKV_JOB_QUERY_LO] = (int32_t) (uint32_t) slots;
    job[RKV_JOB_QUERY_HI] = (int32_t) (uint32_t) (slots >> 32);
    job[RKV_JOB_PIN]      = a.params.pin;
    ggml_backend_tensor_set(jobs, job, 0, sizeof(job));

    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        rkv_set_error("the selection failed to compute");
        return -1;
    }
    ggml_backend_tensor_get(sel, idx, 0, ggml_nbytes(sel));
    if (score) {
        ggml_backend_tensor_get(z, score, 0, ggml_nbytes(z));
    }
    if (aux && a.aux) {
        ggml_backend_tensor_get(aux, stored_aux.data(), 0, ggml_nbytes(aux));
        each_aux([&](int64_t to, int64_t from) { a.aux[to] = stored_aux[from]; });
    }
    if (stats && a.stats) {
        ggml_backend_tensor_get(stats, a.stats, 0, ggml_nbytes(stats));
    }
    return 0;
}

int32_t rkv_unrotate(const rkv_select_args * args, float * k) {
    if (!args || !k || !args->pos || args->n < 1 || args->n_head_kv < 1 || args->n_embd_head < 1) {
        rkv_set_error("arguments are missing");
        return -1;
    }
    if (!check_rope(*args)) {
        return -1;
    }
    if (args->rope_n_rot == 0) {
        return 0;
    }
    const rkv_op_params op = op_of(*args);
    const size_t n = (size_t) args->n*args->n_head_kv;
    const auto table = rkv_rope_table(rope_of(*args), 1 + *std::max_element(args->pos, args->pos + n));
    for (size_t i = 0; i < n; ++i) {
        rkv_undo_rotation(op, k + i*args->n_embd_head, args->n_embd_head, args->pos[i], table.data(), op.n_rot);
    }
    return 0;
}
