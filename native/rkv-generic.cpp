#include "rkv-generic.h"
#include "rkv-policy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

bool rkv_generic_forced() {
    const char * s = std::getenv("RKV_GENERIC");
    return s && *s && strcmp(s, "0") != 0;
}

bool rkv_has_kernel(ggml_backend_dev_t dev, const ggml_tensor * node) {
    const auto & par = *(const rkv_op_params *) node->op_params;
    const bool rare = par.sub_op == RKV_SUB_OP_SCORE &&
        ((node->src[6] && rkv_asks_queries(par.policy)) || (node->src[5] && par.rope_begin > 0));
    if (rkv_generic_forced() || (rare && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU)) {
        return false;
    }
    const char * backend = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev));
    return strcmp(backend, "RPC") != 0 && ggml_backend_dev_supports_op(dev, node);
}

ggml_tensor * rkv_values_view(ggml_context * ctx, ggml_tensor * v, bool v_trans, int64_t n_embd_v, int64_t n_head_kv) {
    if (!v_trans) {
        return ggml_view_4d(ctx, v, n_embd_v, v->ne[1], n_head_kv, v->ne[2], v->nb[1], ggml_row_size(v->type, n_embd_v), v->nb[2], 0);
    }
    const size_t el = ggml_type_size(v->type), line = el*v->ne[1];
    ggml_tensor * t = ggml_view_4d(ctx, v, n_embd_v, v->ne[1], n_head_kv, v->ne[2], el, line*n_embd_v, v->nb[2], 0);
    t->nb[0] = line;
    return t;
}

bool rkv_generic::is_made_of_ops(const rkv_op_params & par) { return par.policy <= RKV_POLICY_LATEST && par.memory == 0.0f; }

namespace {

constexpr int BLOCK = 32; // rows whose cosines are there at once

struct graph {
    graph(ggml_backend_dev_t dev, size_t n_nodes) : dev(dev),
        ctx(ggml_init({ 2*n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true })),
        gf(ggml_new_graph_custom(ctx.get(), n_nodes, false)) {}

    ggml_backend_dev_t dev;
    ggml_context_ptr   ctx;
    ggml_cgraph      * gf;
    std::map<ggml_tensor *, std::vector<uint8_t>> inputs;

    ggml_context * operator()() const { return ctx.get(); }

    template<typename T>
    ggml_tensor * input(ggml_type type, const std::vector<T> & data, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), type, ne0, ne1, ne2);
        ggml_set_input(t);
        inputs[t].resize(ggml_nbytes(t));
        memcpy(inputs[t].data(), data.data(), ggml_nbytes(t));
        return t;
    }
    // an input of which views are taken: each view of what lies on the host would be copied to the device by itself
    template<typename T>
    ggml_tensor * local(ggml_type type, const std::vector<T> & data, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
        ggml_tensor * t    = input(type, data, ne0, ne1, ne2);
        ggml_tensor * copy = ggml_cont(ctx.get(), t);
        return runs(copy) ? copy : t;
    }
    bool runs(const ggml_tensor * node) const { return ggml_backend_dev_supports_op(dev, node); }
    ggml_tensor * expand(ggml_tensor * t) { ggml_build_forward_expand(gf, t); return t; }
};

struct shape3 {
    int64_t ne[3];
    size_t  nb[3];
};

// A view of root's bytes as another type. `after` is the node that wrote them last: the order of reads and writes in
// the cache stays visible to backends that reorder a graph.
ggml_tensor * alias(const graph & g, ggml_tensor * root, ggml_tensor * after, ggml_type type, const shape3 & s, size_t offset) {
    ggml_tensor * t = ggml_view_1d(g(), root, ggml_blck_size(root->type), offset);
    t->type   = type;
    t->src[0] = after;
    for (int i = 0; i < 3; ++i) {
        t->ne[i] = s.ne[i];
        t->nb[i] = s.nb[i];
    }
    t->ne[3] = 1;
    t->nb[3] = t->nb[2]*t->ne[2];
    return t;
}

ggml_tensor * rows_of(const graph & g, ggml_tensor * t, int64_t first, int64_t n) {
    const size_t nb2 = t->ne[2] == 1 ? n*t->nb[1] : t->nb[2]; // one head's rows are contiguous
    return ggml_view_3d(g(), t, t->ne[0], n, t->ne[2], t->nb[1], nb2, first*t->nb[1]);
}

ggml_tensor * product_f32(const graph & g, ggml_tensor * a, ggml_tensor * b) {
    ggml_tensor * t = ggml_mul_mat(g(), a, b);
    ggml_prec_set_acc(t, GGML_PREC_F32);
    ggml_prec_set_src(t, GGML_PREC_F32, 1); // asked for; whether a device obeys is measured
    return t;
}

//
// gathering
//

// What moves 4 bytes as they are. Positions read as F32 would be denormals: I32 where the device knows it.
ggml_type word_type(ggml_backend_dev_t dev) {
    ggml_context_ptr ctx { ggml_init({ 8*ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor * t   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, 8, 16, 2);
    ggml_tensor * idx = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 16, 2);
    ggml_tensor * got = ggml_get_rows(ctx.get(), t, idx);
    ggml_tensor * put = ggml_cpy(ctx.get(), got, t);
    return ggml_backend_dev_supports_op(dev, got) && ggml_backend_dev_supports_op(dev, put) ? GGML_TYPE_I32 : GGML_TYPE_F32;
}

// how the lines of a view are gathered
struct layout {
    explicit layout(const ggml_tensor * data, int64_t n_idx) {
        const size_t bytes = ggml_row_size(data->type, data->ne[0]);
        ratio  = data->ne[2]/n_idx;
        n      = n_idx;
        cell   = data->nb[1];
        line   = data->nb[2];
        if (ratio > 1 && line == bytes) { // heads that move alike lie side by side
            unit  = bytes*ratio;
            group = line*ratio;
            ratio = 1;
        } else {
            unit  = bytes;
            group = line*ratio;
        }
        base = data->view_src ? data->view_offs : 0;
        transposed = ratio > 1;
        possible   = !transposed || (unit == cell && (unit == 2 || unit == 4));
        const auto whole = [](size_t x) { return x % 4 == 0; };
        atom   = transposed ? unit : whole(unit) && whole(cell) && whole(group) && whole(base) && whole(data->nb[3]) ? 4 : 2;
        direct = !transposed && atom == 4;
        n_atom = transposed ? ratio : unit/atom;
        n_word = (n_atom*atom + 3)/4;
    }
    int64_t ratio, n; // lines per index list, index lists
    size_t  unit, cell, line, group, base;
    bool    transposed, possible, direct;
    size_t  atom;
    int64_t n_atom, n_word; // of what moves for a row
};

// Rows idx [n, lists] -> rows dst, dst + 1, .. of each line of data, as bytes. Rows move towards the front, in ascending
// order: a block never overwrites what a later block reads.
void move_rows(graph & g, ggml_tensor * data, ggml_tensor * idx, const int32_t * job) {
    const layout l(data, idx->ne[1]);
    const ggml_type word  = word_type(g.dev);
    const ggml_type atom  = l.atom == 2 ? GGML_TYPE_F16 : word;
    const int64_t   n_row = idx->ne[0], end = job[RKV_JOB_END];
    const size_t    w     = 4*l.n_word;
    ggml_tensor   * root  = data->view_src ? data->view_src : data;
    ggml_tensor   * cur   = root;

    const size_t  budget = RKV_GENERIC_TEMP/2;
    const int64_t n_list = std::clamp<int64_t>(budget/(w*(l.direct ? n_row : 2*end + n_row)), 1, l.n);
    const int64_t n_step = std::clamp<int64_t>(budget/(w*n_list), 1, n_row);

    for (int64_t h = 0; h < l.n; h += n_list) {
        const int64_t nh   = std::min(n_list, l.n - h);
        const size_t  base = l.base + job[RKV_JOB_STREAM]*data->nb[3] + h*l.group;

        ggml_tensor * src;
        if (l.direct) {
            src = alias(g, root, cur, word, { { l.n_word, end, nh }, { 4, l.cell, l.group } }, base);
        } else {
            ggml_tensor * x = l.transposed ?
                alias(g, root, cur, atom, { { end, l.n_atom, nh }, { l.atom, l.line, l.group } }, base) :
                alias(g, root, cur, atom, { { l.n_atom, end, nh }, { l.atom, l.cell, l.group } }, base);
            if (l.transposed) {
                x = ggml_permute(g(), x, 1, 0, 2, 3);
            }
            if (l.n_atom*l.atom == w) {
                x = ggml_cont(g(), x);
            } else { // one atom more makes whole words
                x = ggml_cont(g(), x);
                x = ggml_concat(g(), x, ggml_view_3d(g(), x, 1, end, nh, x->nb[1], x->nb[2], 0), 0);
            }
            src = alias(g, x, x, word, { { l.n_word, end, nh }, { 4, w, w*end } }, 0);
        }
        for (int64_t r = 0; r < n_row; r += n_step) {
            const int64_t nr  = std::min(n_step, n_row - r);
            const size_t  dst = base + (job[RKV_JOB_DST] + r)*l.cell;
            ggml_tensor * got = ggml_get_rows(g(), src,
                ggml_view_2d(g(), idx, nr, nh, idx->nb[1], h*idx->nb[1] + r*idx->nb[0]));
            if (l.direct) {
                cur = ggml_cpy(g(), got, alias(g, root, cur, word, { { l.n_word, nr, nh }, { 4, l.cell, l.group } }, dst));
                src = alias(g, root, cur, word, { { l.n_word, end, nh }, { 4, l.cell, l.group } }, base);
            } else if (l.transposed) {
                // the destination is the transposed one: ggml-cuda copies a transposed source as if the other were contiguous
                ggml_tensor * from = alias(g, got, got, atom, { { l.n_atom, nr, nh }, { l.atom, w, w*nr } }, 0);
                cur = ggml_cpy(g(), from, alias(g, root, cur, atom, { { l.n_atom, nr, nh }, { l.line, l.atom, l.group } }, dst));
            } else {
                ggml_tensor * from = alias(g, got, got, atom, { { l.n_atom, nr, nh }, { l.atom, w, w*nr } }, 0);
                cur = ggml_cpy(g(), from, alias(g, root, cur, atom, { { l.n_atom, nr, nh }, { l.atom, l.cell, l.group } }, dst));
            }
            g.expand(cur);
        }
    }
}

//
// scores
//

// F32 [n_embd, rows, heads], or its leading 11 bits and the rest: then products with either part are exact on units
// that round F32 to TF32 or F16
struct matrix {
    ggml_tensor * hi;
    ggml_tensor * lo = nullptr;
};

constexpr float SPLIT_SCALE = 256.0f; // keeps the rest of a unit vector's elements above F16's denormals

struct scorer {
    graph & g;
    const rkv_generic_layer & layer;
    const int32_t * job;
    bool split;
    std::vector<int32_t> pos; // [n_cells, n_head_kv] of the stream, for `latest`

    const rkv_op_params & par = layer.op;
    const int64_t n_head  = par.n_head_kv;
    const int64_t n_embd  = layer.k->ne[0]/n_head;
    const int64_t n_group = layer.q->ne[0]/layer.k->ne[0];
    const int64_t begin   = job[RKV_JOB_BEGIN];
    const int64_t n       = job[RKV_JOB_END] - begin;
    const int64_t n_old   = job[RKV_JOB_OLD_END] - begin;
    const int64_t n_new   = n - n_old;
    const int64_t n_cand  = n - par.window;
    int64_t n_query = 0;

    // inputs
    ggml_tensor * queries = nullptr; // [n_embd, n_group*n_query, n_head]
    ggml_tensor * sinks = nullptr;   // [1, n_query, n_head], or none
    ggml_tensor * off_diagonal = nullptr, * newness = nullptr, * least = nullptr; // rkv
    ggml_tensor * not_later = nullptr, * none = nullptr, * column = nullptr, * hadamard = nullptr, * rope = nullptr, * at_lo = nullptr, * at_hi = nullptr; // latest
    ggml_tensor * aux_cur = layer.aux;

    //
    // plan
    //

    // bytes of temporary memory per head: about 8 copies of the keys, 6 of a block of cosines
    size_t head_size() const {
        const int64_t cols = par.policy == RKV_POLICY_LATEST ? n_new + par.n_sim : n;
        const int64_t n_embd_v = layer.v ? layer.n_embd_v : 0;
        return sizeof(float)*((8*n_embd + 3*n_embd_v)*n + 6*BLOCK*cols + 4*n*n_group*std::min<int64_t>(par.window, 64));
    }
    int64_t heads_at_once() const { return std::clamp<int64_t>(RKV_GENERIC_TEMP*3/4/head_size(), 1, n_head); }

    //
    // products
    //

    matrix make(ggml_tensor * x) const {
        if (!split) {
            return { x, nullptr };
        }
        x = ggml_scale(g(), ggml_is_contiguous(x) ? x : ggml_cont(g(), x), SPLIT_SCALE);
        ggml_tensor * hi = ggml_cast(g(), ggml_cast(g(), x, GGML_TYPE_F16), GGML_TYPE_F32);
        return { hi, ggml_sub(g(), x, hi) };
    }
    matrix part(const matrix & m, int64_t first, int64_t count) const {
        return { rows_of(g, m.hi, first, count), m.lo ? rows_of(g, m.lo, first, count) : nullptr };
    }
    ggml_tensor * product(const matrix & a, const matrix & b) const {
        if (!a.lo) {
            return product_f32(g, a.hi, b.hi);
        }
        ggml_tensor * t = ggml_add(g(), product_f32(g, a.hi, b.lo), product_f32(g, a.lo, b.hi));
        return ggml_scale(g(), ggml_add(g(), t, product_f32(g, a.hi, b.hi)), 1.0f/(SPLIT_SCALE*SPLIT_SCALE));
    }

    //
    // keys and values
    //

    // F32 [n_embd, n, nh] of the cache's K or V
    ggml_tensor * rows(ggml_tensor * all, int64_t n_embd, int64_t h, int64_t nh) {
        const ggml_type type = all->type;
        const size_t    head = ggml_row_size(type, n_embd);
        const size_t    cell = all->nb[1], offset = job[RKV_JOB_STREAM]*all->nb[2] + begin*cell + h*head;
        ggml_tensor * k = ggml_view_3d(g(), all, n_embd, n, nh, cell, head, offset);
        if (ggml_is_quantized(type)) { // ggml-vulkan reads blocks only from where they are aligned: bring them there
            const bool   words = head % 4 == 0 && cell % 4 == 0 && offset % 4 == 0;
            const size_t el    = words ? 4 : 2;
            ggml_tensor * x = ggml_cont(g(), alias(g, all, all, words ? word_type(g.dev) : GGML_TYPE_F16,
                { { (int64_t) (head/el), n, nh }, { el, cell, head } }, offset));
            k = alias(g, x, x, type, { { n_embd, n, nh }, { ggml_type_size(type), head, head*n } }, 0);
        }
        if (type == GGML_TYPE_F32) {
            return ggml_cont(g(), k);
        }
        ggml_tensor * x = ggml_cast(g(), k, GGML_TYPE_F32);
        if (!g.runs(x)) {
            std::vector<int32_t> all(n*nh);
            for (size_t i = 0; i < all.size(); ++i) {
                all[i] = i % n;
            }
            ggml_tensor * y = ggml_get_rows(g(), k, g.input(GGML_TYPE_I32, all, n, nh));
            return g.runs(y) ? y : x;
        }
        return x;
    }
    ggml_tensor * length(ggml_tensor * x) const { return ggml_sqrt(g(), ggml_sum_rows(g(), ggml_sqr(g(), x))); }
    ggml_tensor * unit(ggml_tensor * x, ggml_tensor * len) const { return ggml_div(g(), x, ggml_scale_bias(g(), len, 1.0f, 1e-8f)); }
    ggml_tensor * unit(ggml_tensor * x) const { return unit(x, length(x)); }

    // [n, 1, nh]: how far values are from their mean. A Hadamard rotation of the cache does not change it.
    ggml_tensor * value_distances(int64_t h, int64_t nh) {
        const int64_t d = layer.n_embd_v;
        ggml_tensor * v = layer.v, * across; // [n_embd, n, nh], [n, n_embd, nh]
        const auto turned = [&](ggml_tensor * x) { return ggml_cont(g(), ggml_permute(g(), x, 1, 0, 2, 3)); };
        if (layer.v_trans) {
            const size_t el = ggml_type_size(v->type), line = el*v->ne[1];
            v = alias(g, v, v, v->type, { { n, d, nh }, { el, line, line*d } }, job[RKV_JOB_STREAM]*v->nb[2] + begin*el + h*line*d);
            across = v->type == GGML_TYPE_F32 ? ggml_cont(g(), v) : ggml_cast(g(), v, GGML_TYPE_F32);
            v      = turned(across);
        } else {
            v      = rows(v, d, h, nh);
            across = turned(v);
        }
        ggml_tensor * mean = ggml_scale(g(), ggml_reshape_3d(g(), ggml_sum_rows(g(), across), d, 1, nh), 1.0f/n);
        return ggml_reshape_3d(g(), length(ggml_sub(g(), v, mean)), n, 1, nh);
    }
    // Centred first: some backends take the variance as a difference of two means.
    ggml_tensor * logistic(ggml_tensor * x) const {
        x = ggml_sub(g(), x, ggml_scale(g(), ggml_sum_rows(g(), x), 1.0f/x->ne[0]));
        return ggml_sigmoid(g(), ggml_scale(g(), ggml_norm(g(), x, RKV_LEAST_VARIANCE), RKV_LOGISTIC_SCALE));
    }

    // of [n, 1, heads]
    ggml_tensor * candidates(ggml_tensor * t) const {
        return ggml_cont(g(), ggml_view_3d(g(), t, n_cand, 1, t->ne[2], t->nb[1], t->nb[2], 0));
    }

    // RoPE (and the cache's Hadamard rotation) undone; elements may come in another order, the same for all keys
    ggml_tensor * unrotated(ggml_tensor * x, int64_t h, int64_t nh) {
        const int64_t m = n*nh;
        if (par.n_hadamard > 0) {
            x = product(make(hadamard), make(ggml_reshape_2d(g(), split ? unit(x) : x, par.n_hadamard, n_embd/par.n_hadamard*m)));
        }
        if (!rope) {
            return ggml_reshape_3d(g(), x, n_embd, n, nh);
        }
        const int64_t half = par.n_rot/2;
        const size_t  f    = sizeof(float);
        x = ggml_reshape_2d(g(), x, n_embd, m);

        ggml_tensor * lo = ggml_get_rows(g(), rope, ggml_view_1d(g(), at_lo, m, h*n*f));
        ggml_tensor * hi = ggml_get_rows(g(), rope, ggml_view_1d(g(), at_hi, m, h*n*f));
        const auto columns = [&](ggml_tensor * t, int64_t first, int64_t n) { return ggml_cont(g(), ggml_view_2d(g(), t, n, m, t->nb[1], first*f)); };
        const auto halves = [&](ggml_tensor * t, int i) { return columns(t, i*half, half); };
        const int64_t tail = n_embd - par.rope_begin - par.n_rot;
        ggml_tensor * whole = x;
        if (par.rope_begin > 0) {
            x = columns(x, par.rope_begin, par.n_rot);
        }
        ggml_tensor * c0 = halves(lo, 0), * s0 = halves(lo, 1), * c1 = halves(hi, 0), * s1 = halves(hi, 1);
        ggml_tensor * c = ggml_sub(g(), ggml_mul(g(), c0, c1), ggml_mul(g(), s0, s1));
        ggml_tensor * s = ggml_add(g(), ggml_mul(g(), s0, c1), ggml_mul(g(), c0, s1));
        if (par.rope_mscale != 1.0f) {
            c = ggml_scale(g(), c, 1.0f/par.rope_mscale);
            s = ggml_scale(g(), s, 1.0f/par.rope_mscale);
        }
        ggml_tensor * x0, * x1;
        if (par.flags & RKV_FLAG_ROPE_NEOX) {
            x0 = halves(x, 0);
            x1 = halves(x, 1);
        } else {
            ggml_tensor * pairs = ggml_cont(g(), ggml_permute(g(), ggml_view_3d(g(), x, 2, half, m, 2*f, x->nb[1], 0), 1, 0, 2, 3));
            x0 = ggml_view_2d(g(), pairs, half, m, pairs->nb[2], 0);
            x1 = ggml_view_2d(g(), pairs, half, m, pairs->nb[2], pairs->nb[1]);
        }
        ggml_tensor * y0 = ggml_add(g(), ggml_mul(g(), x0, c), ggml_mul(g(), x1, s));
        ggml_tensor * y1 = ggml_sub(g(), ggml_mul(g(), x1, c), ggml_mul(g(), x0, s));
        ggml_tensor * y  = ggml_concat(g(), y0, y1, 0);
        if (par.rope_begin > 0) {
            y = ggml_concat(g(), y, columns(whole, 0, par.rope_begin), 0);
        }
        if (tail > 0) {
            y = ggml_concat(g(), y, columns(whole, n_embd - tail, tail), 0);
        }
        return ggml_reshape_3d(g(), y, n_embd, n, nh);
    }

    //
    // I, R and L, each [n or n_cand, 1, heads]
    //

    ggml_tensor * importance(ggml_tensor * k, ggml_tensor * len, int64_t h, int64_t nh) {
        const int64_t n_row = n_group*n_query;
        ggml_tensor * q = ggml_view_3d(g(), queries, n_embd, n_row, nh, queries->nb[1], queries->nb[2], h*queries->nb[2]);
        ggml_tensor * k_len = candidates(ggml_reshape_3d(g(), len, n, 1, nh));
        ggml_tensor * x;
        if (split) { // unit vectors, so that the parts stay within F16's range
            ggml_tensor * q_len = length(q);
            x = product(make(rows_of(g, unit(k, len), 0, n_cand)), make(unit(q, q_len)));
            x = ggml_mul(g(), ggml_mul(g(), x, k_len), q_len);
        } else {
            x = product_f32(g, rows_of(g, k, 0, n_cand), q);
        }
        x = ggml_pool_2d(g(), x, GGML_OP_POOL_MAX, 1, n_group, 1, n_group, 0, 0); // of the group
        if (par.softcap > 0.0f) {
            x = ggml_scale(g(), ggml_tanh(g(), ggml_scale(g(), x, par.scale/par.softcap)), par.softcap);
        } else {
            x = ggml_scale(g(), x, par.scale);
        }
        if (sinks) { // one key more, of every query
            x = ggml_concat(g(), ggml_reshape_3d(g(), x, n_cand, n_query, nh),
                ggml_view_3d(g(), sinks, 1, n_query, nh, sinks->nb[1], sinks->nb[2], h*sinks->nb[2]), 0);
        }
        x = ggml_soft_max(g(), x);
        if (sinks) {
            x = ggml_cont(g(), ggml_view_3d(g(), x, n_cand, n_query, nh, x->nb[1], x->nb[2], 0));
        }
        x = ggml_pool_2d(g(), x, GGML_OP_POOL_AVG, 1, n_query, 1, n_query, 0, 0);
        const int reach = par.pool/2;
        x = reach ? ggml_pool_2d(g(), x, GGML_OP_POOL_MAX, 2*reach + 1, 1, 1, 1, reach, 0) : x;
        // maxima may lose a key's NaN; 0*NaN is NaN again
        return ggml_add(g(), x, ggml_scale(g(), ggml_sum_rows(g(), ggml_reshape_3d(g(), k_len, n_cand, 1, nh)), 0.0f));
    }

    ggml_tensor * redundancy(ggml_tensor * k, int64_t nh) {
        ggml_tensor * sum = ggml_sum_rows(g(), ggml_cont(g(), ggml_permute(g(), k, 1, 0, 2, 3))); // [1, n_embd, heads]
        sum = ggml_reshape_3d(g(), sum, n_embd, 1, nh);
        // minus the column sums, and the cosines that are spared
        ggml_tensor * less = g.expand(ggml_sum_rows(g(), ggml_mul(g(), ggml_sub(g(), k, sum), k)));

        const matrix m = make(k);
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t nb = std::min<int64_t>(BLOCK, n - i);
            // rows i.. of the block run along dimension 0, keys j along 1
            ggml_tensor * c = product(part(m, i, nb), m);
            c = ggml_mul(g(), c, ggml_view_2d(g(), off_diagonal, nb, n, off_diagonal->nb[1], (n - i)*off_diagonal->nb[1]));
            ggml_tensor * w = ggml_step(g(), ggml_scale_bias(g(), c, 1.0f, -par.threshold));
            w = ggml_mul(g(), w, newness);
            if (least) {
                w = ggml_add(g(), w, least);
            }
            ggml_tensor * top = ggml_pool_2d(g(), w, GGML_OP_POOL_MAX, 1, n, 1, n, 0, 0);
            top = ggml_scale_bias(g(), ggml_clamp(g(), top, 1.0f, INFINITY), 1.0f, -0.5f); // where there is no copy w is 0
            ggml_tensor * spared = ggml_mul(g(), ggml_step(g(), ggml_sub(g(), w, top)), c);
            less = g.expand(ggml_add(g(), less, ggml_sum_rows(g(), spared)));
        }
        return ggml_soft_max(g(), ggml_scale(g(), ggml_reshape_3d(g(), less, n, 1, nh), -1.0f/n));
    }

    shape3 aux_shape(int64_t count, int64_t nh) const {
        return { { par.n_sim, count, nh }, { sizeof(float), layer.aux->nb[1], layer.aux->nb[2] } };
    }
    size_t aux_offset(int64_t row, int64_t h) const {
        return (begin + row)*layer.aux->nb[1] + h*layer.aux->nb[2] + job[RKV_JOB_STREAM]*layer.aux->nb[3];
    }

    // The highest along dimension 0, descending: [n_sim, rows, heads]. One after the other is taken away, the last of
    // equals first: sorting is what backends differ in most.
    ggml_tensor * highest(ggml_tensor * x) const {
        const auto top = [&](ggml_tensor * t) { return ggml_pool_2d(g(), t, GGML_OP_POOL_MAX, t->ne[0], 1, t->ne[0], 1, 0, 0); };
        ggml_tensor * res = top(x);
        ggml_tensor * max = res;
        for (int s = 1; s < par.n_sim; ++s) {
            ggml_tensor * w = ggml_step(g(), ggml_scale_bias(g(), ggml_sub(g(), x, max), 1.0f, 1e-30f)); // 1 where equal
            w   = ggml_mul(g(), w, column);
            w   = ggml_step(g(), ggml_sub(g(), w, ggml_scale_bias(g(), top(w), 1.0f, -0.5f)));
            x   = ggml_sub(g(), x, ggml_scale(g(), w, 64.0f));
            max = top(x);
            res = ggml_concat(g(), res, max, 0);
        }
        return res;
    }

    ggml_tensor * later_similarity(ggml_tensor * k, int64_t h, int64_t nh) {
        // a NaN is similar to nothing: 0 in k, -4 (or less) in its row and column of cosines
        ggml_tensor * bad = ggml_scale_bias(g(), ggml_step(g(), ggml_scale_bias(g(), ggml_sum_rows(g(), ggml_sqr(g(), k)), 1.0f, 1.0f)), 4.0f, -4.0f);
        ggml_tensor * bad_new = rows_of(g, bad, n_old, n_new);
        bad = ggml_reshape_3d(g(), bad, n, 1, nh);
        k = ggml_sub(g(), ggml_relu(g(), k), ggml_relu(g(), ggml_neg(g(), k)));

        const matrix m = make(k), fresh = part(m, n_old, n_new);
        for (int64_t i = 0; n_new > 0 && i < n; ) {
            const bool    old = i < n_old;
            const int64_t nb  = std::min<int64_t>(BLOCK, (old ? n_old : n) - i);
            ggml_tensor * c = product(part(m, i, nb), fresh);
            c = ggml_add(g(), c, ggml_view_3d(g(), bad, nb, 1, nh, bad->nb[1], bad->nb[2], i*bad->nb[0]));
            c = ggml_add(g(), c, bad_new);
            if (!old) {
                c = ggml_add(g(), c, ggml_view_2d(g(), not_later, nb, n_new, not_later->nb[1], (n - i)*not_later->nb[1]));
            }
            ggml_tensor * best = old ?
                ggml_cont(g(), alias(g, layer.aux, aux_cur, GGML_TYPE_F32, aux_shape(nb, nh), aux_offset(i, h))) :
                ggml_view_3d(g(), none, par.n_sim, nb, nh, none->nb[1], none->nb[2], 0);
            best = highest(ggml_concat(g(), best, ggml_cont(g(), ggml_permute(g(), c, 1, 0, 2, 3)), 0));
            aux_cur = g.expand(ggml_cpy(g(), best, alias(g, layer.aux, aux_cur, GGML_TYPE_F32, aux_shape(nb, nh), aux_offset(i, h))));
            i += nb;
        }
        ggml_tensor * all = ggml_cont(g(), alias(g, layer.aux, aux_cur, GGML_TYPE_F32, aux_shape(n, nh), aux_offset(0, h)));
        return ggml_reshape_3d(g(), ggml_scale(g(), ggml_sum_rows(g(), all), 1.0f/par.n_sim), n, 1, nh);
    }

    //
    // Z
    //

    void make_inputs() {
        std::vector<int32_t> slots;
        const uint64_t bits = (uint32_t) job[RKV_JOB_QUERY_LO] | (uint64_t) (uint32_t) job[RKV_JOB_QUERY_HI] << 32;
        for (int slot = 0; slot < par.window; ++slot) {
            if (bits >> slot & 1) {
                slots.push_back(slot);
            }
        }
        n_query = slots.size();
        if (n_query > 0) {
            ggml_tensor * q = ggml_view_2d(g(), layer.q, layer.q->ne[0], layer.q->ne[1], layer.q->nb[1], job[RKV_JOB_STREAM]*layer.q->nb[2]);
            q = ggml_get_rows(g(), q, g.input(GGML_TYPE_I32, slots, n_query));
            q = ggml_cont(g(), ggml_permute(g(), ggml_reshape_4d(g(), q, n_embd, n_group, n_head, n_query), 0, 1, 3, 2));
            queries = ggml_reshape_3d(g(), q, n_embd, n_group*n_query, n_head);
            if (layer.sinks) { // the group's largest, as with the logits
                std::vector<float> all(n_group*n_head), top(n_query*n_head);
                ggml_backend_tensor_get(layer.sinks, all.data(), 0, all.size()*sizeof(float));
                for (size_t i = 0; i < top.size(); ++i) {
                    top[i] = *std::max_element(all.begin() + i/n_query*n_group, all.begin() + (i/n_query + 1)*n_group);
                }
                sinks = g.input(GGML_TYPE_F32, top, 1, n_query, n_head);
            }
        }
        if (par.policy == RKV_POLICY_RKV) {
            // row n + j - i of column r: 0 on the diagonal of the block that starts at i
            std::vector<float> band(BLOCK*2*n, 1.0f), order(n);
            for (int64_t r = 0; r < std::min<int64_t>(BLOCK, n); ++r) {
                band[(n + r)*BLOCK + r] = 0.0f;
            }
            for (int64_t j = 0; j < n; ++j) {
                order[j] = j + 1;
            }
            if (par.flags & RKV_FLAG_REFERENCE) { // column 0 is taken where there is no copy
                std::vector<float> first(n, 0.0f);
                first[0] = 1.0f;
                order[0] = 0.0f;
                least = g.input(GGML_TYPE_F32, first, 1, n);
            }
            off_diagonal = g.local(GGML_TYPE_F32, band, BLOCK, 2*n);
            newness      = g.input(GGML_TYPE_F32, order, 1, n);
        }
        if (par.policy == RKV_POLICY_LATEST) {
            // column j' = j - n_old, row i: -4 where j <= i. Block i starts at row n - i.
            std::vector<float> band((size_t) BLOCK*(n + n_new), 0.0f);
            for (int64_t t = 0; t < n + n_new; ++t) {
                for (int64_t r = 0; r < BLOCK; ++r) {
                    band[t*BLOCK + r] = t - n + n_old <= r ? -4.0f : 0.0f;
                }
            }
            not_later = g.local(GGML_TYPE_F32, band, BLOCK, n + n_new);
            none      = g.local(GGML_TYPE_F32, std::vector<float>(par.n_sim*BLOCK*n_head, -1.0f), par.n_sim, BLOCK, n_head);
            std::vector<float> order(n_new + par.n_sim);
            for (size_t j = 0; j < order.size(); ++j) {
                order[j] = j + 1;
            }
            column = g.input(GGML_TYPE_F32, order, order.size());
            if (par.n_hadamard > 0) {
                const int m = par.n_hadamard;
                std::vector<float> had(m*m);
                for (int i = 0; i < m*m; ++i) {
                    int bits = (i/m) & (i%m), odd = 0;
                    for (; bits; bits &= bits - 1) {
                        odd ^= 1;
                    }
                    had[i] = (odd ? -1.0f : 1.0f)/std::sqrt((float) m);
                }
                hadamard = g.input(GGML_TYPE_F32, had, m, m);
            }
            if (layer.rope && par.n_rot > 0) {
                rope = g.input(GGML_TYPE_F32, *layer.rope, par.n_rot, layer.rope->size()/par.n_rot);
                std::vector<int32_t> lo(n*n_head), hi(n*n_head);
                for (int64_t i = 0; i < n*n_head; ++i) {
                    const int32_t p = pos[i/n*layer.pos->ne[0] + begin + i%n];
                    lo[i] = p % RKV_ROPE_LO;
                    hi[i] = RKV_ROPE_LO + p/RKV_ROPE_LO;
                }
                at_lo = g.local(GGML_TYPE_I32, lo, n*n_head);
                at_hi = g.local(GGML_TYPE_I32, hi, n*n_head);
            }
        }
    }

    // [n_cand, n_head]
    ggml_tensor * build() {
        if (par.policy == RKV_POLICY_STREAMING) {
            std::vector<float> z(n_cand*n_head);
            for (size_t i = 0; i < z.size(); ++i) {
                z[i] = i % n_cand;
            }
            return g.input(GGML_TYPE_F32, z, n_cand, n_head);
        }
        make_inputs();

        ggml_tensor * all = nullptr;
        const int64_t n_at_once = heads_at_once();
        for (int64_t h = 0; h < n_head; h += n_at_once) {
            const int64_t nh = std::min(n_at_once, n_head - h);
            ggml_tensor * k   = rows(layer.k, n_embd, h, nh);
            ggml_tensor * len = length(k);
            ggml_tensor * z   = n_query > 0 ? g.expand(importance(k, len, h, nh)) : nullptr;
            if (par.policy == RKV_POLICY_RKV) {
                ggml_tensor * r = ggml_scale(g(), redundancy(unit(k, len), nh), -(1.0f - par.lambda));
                z = z ? ggml_add(g(), ggml_scale(g(), z, par.lambda), candidates(r)) : candidates(r);
            } else if (par.policy == RKV_POLICY_LATEST) {
                ggml_tensor * l = ggml_scale(g(), later_similarity(unit(unrotated(k, h, nh)), h, nh), -(1.0f - par.lambda));
                if (z) {
                    z = ggml_div(g(), z, ggml_pool_2d(g(), z, GGML_OP_POOL_MAX, n_cand, 1, n_cand, 1, 0, 0));
                }
                z = z ? ggml_add(g(), ggml_scale(g(), z, par.lambda), candidates(l)) : candidates(l);
                if (layer.v) {
                    ggml_tensor * d = candidates(value_distances(h, nh));
                    z = ggml_add(g(), logistic(z), ggml_scale(g(), logistic(d), par.value_weight));
                }
            } else if (!z) {
                z = g.input(GGML_TYPE_F32, std::vector<float>(n_cand*nh, 0.0f), n_cand, 1, nh);
            }
            z   = ggml_reshape_2d(g(), z, n_cand, nh);
            all = g.expand(all ? ggml_concat(g(), all, z, 1) : z);
        }
        return all;
    }

    size_t n_nodes() const {
        const size_t n_chunk = (n_head + heads_at_once() - 1)/heads_at_once();
        return n_chunk*(216 + (28 + 14*par.n_sim)*(n/BLOCK + 3));
    }
};

// enough for any view: each list of rows by itself in the worst case
size_t gather_nodes(const std::vector<int64_t> & n_list, int64_t n_row) {
    size_t res = 64;
    for (const int64_t n : n_list) {
        res += 32*n + n_row/8;
    }
    return res;
}

} // namespace

//
// running
//

// One product of unit vectors per shape that the pass uses tells whether a device rounds F32 to less.
bool rkv_generic::is_exact(ggml_backend_t home) {
    const auto it = exact.find(home);
    if (it != exact.end()) {
        return it->second && !force_split;
    }
    constexpr int d = 128;
    bool ok = true;
    for (const auto & [na, nb] : { std::pair<int, int>(BLOCK, 256), { 256, BLOCK }, { 256, 8 } }) {
        graph g(ggml_backend_get_device(home), 16);
        std::vector<float> x(d*(na + nb));
        uint32_t state = 1;
        for (auto & v : x) {
            state = state*1664525u + 1013904223u;
            v = ((int32_t) state)*0x1p-31f*std::sqrt(3.0f/d); // length about 1
        }
        ggml_tensor * a = g.input(GGML_TYPE_F32, std::vector<float>(x.begin(), x.begin() + d*na), d, na);
        ggml_tensor * b = g.input(GGML_TYPE_F32, std::vector<float>(x.begin() + d*na, x.end()), d, nb);
        ggml_tensor * c = product_f32(g, a, b);
        ggml_set_output(c);
        g.expand(c);
        std::vector<float> got(na*nb, NAN);
        if (!run(home, g.gf, g.inputs, nullptr)) {
            return false;
        }
        ggml_backend_tensor_get(c, got.data(), 0, ggml_nbytes(c));
        for (int i = 0; i < na*nb; ++i) {
            double want = 0;
            for (int e = 0; e < d; ++e) {
                want += (double) x[i%na*d + e]*x[(na + i/na)*d + e];
            }
            ok = ok && std::fabs(got[i] - want) < 1e-6;
        }
    }
    exact[home] = ok;
    return ok && !force_split;
}

bool rkv_generic::run(ggml_backend_t home, ggml_cgraph * gf, const std::map<ggml_tensor *, std::vector<uint8_t>> & inputs,
        rkv_generic_result * result) {
    sched_t & s = scheds[home];
    const size_t size = ggml_graph_size(gf);
    if (!s.sched || s.size < size) {
        std::vector<ggml_backend_t> both = { home };
        if (home != cpu) {
            both.push_back(cpu);
        }
        s.sched.reset();
        s.sched.reset(ggml_backend_sched_new(both.data(), nullptr, both.size(), size, false, false));
        s.size = size;
    }
    ggml_backend_sched_reset(s.sched.get());

    ggml_backend_dev_t dev = ggml_backend_get_device(home);
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        switch (node->op) {
            case GGML_OP_VIEW: case GGML_OP_RESHAPE: case GGML_OP_PERMUTE: case GGML_OP_TRANSPOSE: break;
            case GGML_OP_RKV:
                ggml_backend_sched_set_tensor_backend(s.sched.get(), node, rkv_has_kernel(dev, node) ? home : cpu);
                break;
            default:
                ggml_backend_sched_set_tensor_backend(s.sched.get(), node, ggml_backend_dev_supports_op(dev, node) ? home : cpu);
        }
    }
    if (!ggml_backend_sched_alloc_graph(s.sched.get(), gf)) {
        return false;
    }
    for (const auto & [t, data] : inputs) {
        if (t->buffer) {
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
    }
    if (ggml_backend_sched_graph_compute(s.sched.get(), gf) != GGML_STATUS_SUCCESS) {
        return false;
    }
    if (result) {
        result->temp = ggml_backend_sched_get_buffer_size(s.sched.get(), home);
    }
    return true;
}

// The layer's tensors on the CPU, one stream of them, and the kernel there.
bool rkv_generic::score_on_cpu(const rkv_generic_layer & layer, const int32_t * job, std::vector<float> & z) {
    const size_t strm = job[RKV_JOB_STREAM];
    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*24 + ggml_graph_overhead(), nullptr, true }) };
    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> copies; // here, there
    const auto local = [&](ggml_tensor * t) -> ggml_tensor * {
        if (!t) {
            return nullptr;
        }
        int64_t ne[4];
        std::copy_n(t->ne, 4, ne);
        if (t != layer.sinks) {
            ne[t == layer.aux ? 3 : 2] = 1; // streams
        }
        copies.emplace_back(ggml_new_tensor(ctx.get(), t->type, 4, ne), t);
        return copies.back().first;
    };
    ggml_tensor * k = local(layer.k), * v = local(layer.v), * q = local(layer.q), * pos = local(layer.pos), * aux = local(layer.aux),
                * stats = local(layer.stats), * sinks = local(layer.sinks);
    ggml_tensor * jobs  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, RKV_JOB_N, 1);
    ggml_tensor * q_pos = stats ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, layer.op.window, 1) : nullptr;
    ggml_tensor * rope  = layer.rope ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, layer.op.n_rot, layer.rope->size()/layer.op.n_rot) : nullptr;

    ggml_tensor * node = ggml_rkv_score(ctx.get(), k, q, jobs, pos, aux, rope, &layer.op);
    ggml_rkv_score_add_sinks(node, sinks);
    if (v) {
        ggml_rkv_score_add_values(node, rkv_values_view(ctx.get(), v, layer.v_trans, layer.n_embd_v, layer.op.n_head_kv));
    }
    if (stats) {
        ggml_rkv_score_add_stats(node, stats, q_pos);
    }
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, node);
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), cpu) };
    if (!buf) {
        return false;
    }
    const auto offset = [&](const std::pair<ggml_tensor *, ggml_tensor *> & c) {
        return c.second == layer.sinks ? 0 : strm*ggml_nbytes(c.first);
    };
    std::vector<uint8_t> data;
    for (const auto & c : copies) {
        data.resize(ggml_nbytes(c.first));
        ggml_backend_tensor_get(c.second, data.data(), offset(c), data.size());
        ggml_backend_tensor_set(c.first, data.data(), 0, data.size());
    }
    std::vector<int32_t> own(job, job + RKV_JOB_N);
    own[RKV_JOB_STREAM] = 0;
    ggml_backend_tensor_set(jobs, own.data(), 0, ggml_nbytes(jobs));
    if (q_pos) {
        ggml_backend_tensor_set(q_pos, layer.q_pos.data(), 0, ggml_nbytes(q_pos));
    }
    if (rope) {
        ggml_backend_tensor_set(rope, layer.rope->data(), 0, ggml_nbytes(rope));
    }
    if (ggml_backend_graph_compute(cpu, gf) != GGML_STATUS_SUCCESS) {
        return false;
    }
    for (const auto & c : copies) {
        if (c.second == layer.aux || c.second == layer.stats) {
            data.resize(ggml_nbytes(c.first));
            ggml_backend_tensor_get(c.first, data.data(), 0, data.size());
            ggml_backend_tensor_set(c.second, data.data(), offset(c), data.size());
        }
    }
    const int64_t n_cand = job[RKV_JOB_END] - job[RKV_JOB_BEGIN] - layer.op.window;
    z.resize(n_cand*layer.op.n_head_kv);
    for (int64_t h = 0; h < layer.op.n_head_kv; ++h) {
        ggml_backend_tensor_get(node, z.data() + h*n_cand, h*node->nb[1], n_cand*sizeof(float));
    }
    return true;
}

bool rkv_generic::pass(ggml_backend_t home, const rkv_generic_layer & layer, const int32_t * job, const int32_t * new_pos,
        const views & data, rkv_generic_result * result) {
    return work(home, layer, job, new_pos, data, result, true);
}

bool rkv_generic::score(ggml_backend_t home, const rkv_generic_layer & layer, const int32_t * job, const int32_t * new_pos,
        const views & data, std::vector<float> & z) {
    rkv_generic_result result;
    const bool ok = work(home, layer, job, new_pos, data, &result, false);
    z = std::move(result.score);
    return ok;
}

bool rkv_generic::work(ggml_backend_t home, const rkv_generic_layer & layer, const int32_t * job, const int32_t * new_pos,
        const views & data, rkv_generic_result * result, bool moves) {
    const int64_t n_head = layer.op.n_head_kv;
    const int64_t begin  = job[RKV_JOB_BEGIN], old_end = job[RKV_JOB_OLD_END], end = job[RKV_JOB_END];
    const int64_t n      = end - begin;
    const int64_t n_keep = std::min<int64_t>(job[RKV_JOB_KEEP], n);
    const size_t  strm   = job[RKV_JOB_STREAM];
    if (n <= 0) {
        return true;
    }

    // positions of new cells are known here
    if (end > old_end) {
        std::vector<int32_t> fresh;
        for (int64_t h = 0; h < n_head; ++h) {
            fresh.insert(fresh.end(), new_pos + job[RKV_JOB_SHIFT] + old_end, new_pos + job[RKV_JOB_SHIFT] + end);
        }
        const size_t size = (end - old_end)*sizeof(int32_t);
        ggml_backend_tensor_set_2d(layer.pos, fresh.data(), strm*layer.pos->nb[2] + old_end*sizeof(int32_t), size, n_head,
            layer.pos->nb[1], size);
    }
    const bool latest = layer.op.policy == RKV_POLICY_LATEST;
    const bool stores = layer.aux || layer.stats;
    const bool scored = n > layer.op.window && (stores || n_keep < n);
    const bool split  = scored && layer.op.policy != RKV_POLICY_STREAMING && is_made_of_ops(layer.op) && !is_exact(home);

    std::vector<int32_t> pos;
    if (scored && latest && layer.rope) {
        pos.resize(layer.pos->ne[0]*n_head);
        ggml_backend_tensor_get(layer.pos, pos.data(), strm*layer.pos->nb[2], layer.pos->nb[2]);
    }

    ggml_backend_dev_t dev = ggml_backend_get_device(home);
    graph   probe(dev, 1);
    scorer  sizes { probe, layer, job, split, {} };
    graph   g(dev, 16 + (scored ? sizes.n_nodes() : 0) + gather_nodes({ n_head, n_head, n_head, n_head }, n_keep));

    ggml_tensor * jobs = g.input(GGML_TYPE_I32, std::vector<int32_t>(job, job + RKV_JOB_N), RKV_JOB_N);
    ggml_tensor * z;
    if (!scored) {
        z = g.input(GGML_TYPE_F32, std::vector<float>(n*n_head, 0.0f), n, n_head);
    } else {
        ggml_tensor * rope = layer.rope ? g.input(GGML_TYPE_F32, *layer.rope, layer.op.n_rot, layer.rope->size()/layer.op.n_rot) : nullptr;
        z = ggml_rkv_score(g(), layer.k, layer.q, jobs, layer.pos, layer.aux, rope, &layer.op);
        ggml_rkv_score_add_sinks(z, layer.sinks);
        if (layer.v) {
            ggml_rkv_score_add_values(z, rkv_values_view(g(), layer.v, layer.v_trans, layer.n_embd_v, n_head));
        }
        if (layer.stats) {
            ggml_rkv_score_add_stats(z, layer.stats, g.input(GGML_TYPE_I32, layer.q_pos, layer.op.window));
        }
        if (!rkv_has_kernel(dev, z) && is_made_of_ops(layer.op)) {
            z = scorer { g, layer, job, split, std::move(pos) }.build();
        } else if (!rkv_has_kernel(dev, z)) {
            std::vector<float> there;
            if (!score_on_cpu(layer, job, there)) {
                return false;
            }
            z = g.input(GGML_TYPE_F32, there, n - layer.op.window, n_head);
        }
    }
    if (!moves) {
        z = g.expand(ggml_cont(g(), z));
    }
    ggml_set_output(z->view_src ? z->view_src : z);
    rkv_op_params select = layer.op;
    select.window = layer.recent;
    ggml_tensor * idx = ggml_rkv_select(g(), z, jobs, n_keep, &select);
    if (moves) {
        g.expand(idx);
        ggml_set_output(idx);
    }

    ggml_tensor * rows = ggml_cont(g(), idx); // one copy to the device for all that follow
    rows = g.runs(rows) ? rows : idx;
    for (ggml_tensor * view : moves ? data(g()) : std::vector<ggml_tensor *>()) {
        ggml_tensor * node = ggml_rkv_compact(g(), view, rows, jobs, &layer.op);
        if (rkv_has_kernel(dev, node)) {
            g.expand(node);
        } else {
            move_rows(g, view, rows, job);
        }
    }
    if (!run(home, g.gf, g.inputs, result)) {
        return false;
    }
    if (result) {
        if (moves) {
            result->rows.resize(n_keep*n_head);
            ggml_backend_tensor_get(idx, result->rows.data(), 0, ggml_nbytes(idx));
        }
        const int64_t n_cand = scored ? n - layer.op.window : 0;
        result->score.resize(n_cand*n_head);
        for (int64_t h = 0; h < n_head && scored; ++h) {
            ggml_backend_tensor_get(z, result->score.data() + h*n_cand, h*z->nb[1], n_cand*sizeof(float));
        }
    }
    return true;
}

bool rkv_generic::gather(ggml_backend_t home, const int32_t * job, const std::vector<int32_t> & rows, const views & data) {
    const int64_t n = std::min<int64_t>(job[RKV_JOB_KEEP], job[RKV_JOB_END] - job[RKV_JOB_BEGIN]);
    if (n <= 0) {
        return true;
    }
    graph probe(ggml_backend_get_device(home), 64);
    std::vector<int64_t> lists;
    for (const ggml_tensor * view : data(probe())) {
        lists.push_back(layout(view, 1).possible ? 1 : view->ne[2]);
    }
    graph g(ggml_backend_get_device(home), gather_nodes(lists, n));
    for (ggml_tensor * view : data(g())) {
        const int64_t n_list = layout(view, 1).possible ? 1 : view->ne[2];
        std::vector<int32_t> all;
        for (int64_t i = 0; i < n_list; ++i) {
            all.insert(all.end(), rows.begin(), rows.begin() + n);
        }
        move_rows(g, view, g.input(GGML_TYPE_I32, all, n, n_list), job);
    }
    return run(home, g.gf, g.inputs, nullptr);
}

bool rkv_generic::check(ggml_backend_dev_t dev, const views & data) {
    graph g(dev, 4096);
    for (ggml_tensor * view : data(g())) {
        int32_t job[RKV_JOB_N] = {};
        job[RKV_JOB_END] = job[RKV_JOB_KEEP] = 2;
        const int64_t n_list = layout(view, 1).possible ? 1 : view->ne[2];
        move_rows(g, view, g.input(GGML_TYPE_I32, std::vector<int32_t>(2*n_list, 0), 2, n_list), job);
    }
    for (int i = 0; i < ggml_graph_n_nodes(g.gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(g.gf, i);
        if (node->op == GGML_OP_CPY && node->view_src && node->view_src->buffer && !g.runs(node)) {
            return false;
        }
    }
    return true;
}
