#include "rkv-scorer.h"
#include "rkv-unrotate.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

void rkv_team::barrier() const {
    if (nth > 1) {
        ggml_barrier(threadpool);
    }
}

//
// products of 4 vectors with a panel of 16 cells
//

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
#define RKV_SIMD
#endif

// out[r][l] = sum_i a[i*lda + r] * b[i*16 + l], r < 4
static void dot_4x16(int n, const float * a, int lda, const float * b, float out[4][RKV_PANEL]) {
#ifdef RKV_SIMD
    constexpr int NV = RKV_PANEL / GGML_F32_EPR;
    GGML_F32_VEC acc[4][NV];
    for (auto & row : acc) {
        for (auto & v : row) {
            v = GGML_F32_VEC_ZERO;
        }
    }
    for (int i = 0; i < n; ++i) {
        GGML_F32_VEC vb[NV];
        for (int v = 0; v < NV; ++v) {
            vb[v] = GGML_F32_VEC_LOAD(b + i*RKV_PANEL + v*GGML_F32_EPR);
        }
        for (int r = 0; r < 4; ++r) {
            const GGML_F32_VEC va = GGML_F32_VEC_SET1(a[(size_t) i*lda + r]);
            for (int v = 0; v < NV; ++v) {
                acc[r][v] = GGML_F32_VEC_FMA(acc[r][v], va, vb[v]);
            }
        }
    }
    for (int r = 0; r < 4; ++r) {
        for (int v = 0; v < NV; ++v) {
            GGML_F32_VEC_STORE(out[r] + v*GGML_F32_EPR, acc[r][v]);
        }
    }
#else
    for (int r = 0; r < 4; ++r) {
        for (int l = 0; l < RKV_PANEL; ++l) {
            out[r][l] = 0.0f;
        }
    }
    for (int i = 0; i < n; ++i) {
        for (int r = 0; r < 4; ++r) {
            for (int l = 0; l < RKV_PANEL; ++l) {
                out[r][l] += a[(size_t) i*lda + r]*b[i*RKV_PANEL + l];
            }
        }
    }
#endif
}

//
// scratch
//

template <typename T> static T pad_to(T n, int m) { return (n + m - 1)/m*m; }

size_t rkv_scorer::layout(float * base, int n_max, int nth) {
    n_max_pad = pad_to(n_max, RKV_PANEL);

    const size_t cells = (size_t) n_head_kv*n_max_pad;

    size_t used = 0;
    auto take = [&](size_t count) {
        float * p = base ? base + used : nullptr;
        used += pad_to(count, 16);
        return p;
    };
    panels  = take(cells*n_embd);
    queries = take((size_t) n_head_kv*n_embd*pad_to(par.window*n_group + 3, 4));
    logits  = take(cells*par.window);
    norm    = take(cells);
    for (auto & t : tmp) {
        t = take(cells);
    }
    sum  = take((size_t) n_head_kv*n_embd);
    copy = (int32_t *) take(cells);
    const size_t n_row = 4*std::max(n_embd, n_embd_v);
    row  = take(n_row*nth);
    if (base) {
        row += n_row*team.ith;
    }
    return used;
}

//
// keys
//

static void to_float(int type, const void * src, float * dst, int n) {
    switch (type) {
        case GGML_TYPE_F32: memcpy(dst, src, n*sizeof(float)); break;
        case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n); break;
        default:            ggml_get_type_traits((ggml_type) type)->to_float(src, dst, n);
    }
}

static void undo_hadamard(int n_block, float * x, int n) {
    for (int i = 0; n_block > 0 && i < n; i += n_block) {
        rkv_hadamard(x + i, n_block);
    }
}

// Hadamard undone
void rkv_scorer::key_row(int h, int j, float * dst) const {
    to_float(k_type, k + h*k_head + j*k_cell, dst, n_embd);
    undo_hadamard(par.n_hadamard, dst, n_embd);
}

void rkv_scorer::value_row(int h, int j, float * dst) const {
    const char * src = v + h*v_head + j*v_cell;
    if (v_el == ggml_type_size((ggml_type) v_type)) {
        to_float(v_type, src, dst, n_embd_v);
    } else { // transposed
        for (int i = 0; i < n_embd_v; ++i) {
            to_float(v_type, src + i*v_el, dst + i, 1);
        }
    }
    undo_hadamard(par.n_hadamard_v, dst, n_embd_v);
}

void rkv_scorer::load_keys(key_form form) {
    const int np = n_panel();

    for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
        const int h = it/np, b = it%np;
        float * dst = panel(h, b);
        for (int l = 0; l < RKV_PANEL; ++l) {
            const int j = b*RKV_PANEL + l;
            if (j >= n) {
                for (int i = 0; i < n_embd; ++i) {
                    dst[i*RKV_PANEL + l] = 0.0f;
                }
                norm[(size_t) h*n_max_pad + j] = 0.0f;
                continue;
            }
            if (form == PLAIN) {
                key_row(h, j, row);
            } else {
                to_float(k_type, k + h*k_head + j*k_cell, row, n_embd);
            }
            if (form == UNROTATED) {
                rkv_undo_rotation(par, row, n_embd, pos[h*pos_head + j], rope, rope_row);
            }
            float sq = 0.0f;
            ggml_vec_dot_f32(n_embd, &sq, 0, row, 0, row, 0, 1);
            norm[(size_t) h*n_max_pad + j] = std::sqrt(sq);
            for (int i = 0; i < n_embd; ++i) {
                dst[i*RKV_PANEL + l] = row[i];
            }
        }
    }
    team.barrier();
}

void rkv_scorer::normalise_keys() {
    const int np = n_panel();
    for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
        const int h = it/np, b = it%np;
        float * dst = panel(h, b);
        float inv[RKV_PANEL];
        for (int l = 0; l < RKV_PANEL; ++l) {
            const float len = norm[(size_t) h*n_max_pad + b*RKV_PANEL + l];
            inv[l] = 1.0f/(len + 1e-8f);
        }
        for (int i = 0; i < n_embd; ++i) {
            for (int l = 0; l < RKV_PANEL; ++l) {
                dst[i*RKV_PANEL + l] *= inv[l];
            }
        }
    }
    team.barrier();
}

static void soft_cap(float * x, int n, float cap) {
    for (int j = 0; cap > 0.0f && j < n; ++j) {
        x[j] = cap*std::tanh(x[j]/cap);
    }
}

//
// importance: mean over the window's queries of the softmax over the candidates, max-pooled
//

void rkv_scorer::attention(float * A) {
    load_keys(RAW);

    const size_t stride = n_max_pad;
    const int    n_row  = n_query*n_group;
    const int    n_rpad = pad_to(par.window*n_group, 4);
    const int    np     = (n_cand + RKV_PANEL - 1)/RKV_PANEL;

    // queries of a KV head as columns, [n_embd, n_rpad]: row r = i*n_group + g
    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        float * dst = queries + (size_t) h*n_embd*n_rpad;
        for (int r = 0; r < n_rpad; ++r) {
            const float * q = r < n_row ? query[r/n_group] + ((size_t) h*n_group + r%n_group)*n_embd : nullptr;
            for (int i = 0; i < n_embd; ++i) {
                dst[(size_t) i*n_rpad + r] = q ? q[i] : 0.0f;
            }
        }
    }
    team.barrier();

    // logits, the largest of the group
    for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
        const int h = it/np, b = it%np;
        const float * qh = queries + (size_t) h*n_embd*n_rpad;
        float * lh = logits + (size_t) h*par.window*stride;
        for (int r0 = 0; r0 < n_row; r0 += 4) {
            float out[4][RKV_PANEL];
            dot_4x16(n_embd, qh + r0, n_rpad, panel(h, b), out);
            for (int r = r0; r < std::min(r0 + 4, n_row); ++r) {
                float * dst = lh + (r/n_group)*stride + b*RKV_PANEL;
                for (int l = 0; l < RKV_PANEL; ++l) {
                    dst[l] = r%n_group == 0 ? out[r - r0][l] : std::max(dst[l], out[r - r0][l]);
                }
            }
        }
    }
    team.barrier();

    for (int it = team.ith; it < n_head_kv*n_query; it += team.nth) {
        float * x = logits + ((size_t) (it/n_query)*par.window + it%n_query)*stride;
        ggml_vec_scale_f32(n_cand, x, par.scale);
        soft_cap(x, n_cand, par.softcap);
        float sink = -INFINITY; // the group's largest, as with the logits
        for (int g = 0; sinks && g < n_group; ++g) {
            sink = std::max(sink, sinks[it/n_query*n_group + g]);
        }
        float top = -INFINITY;
        ggml_vec_max_f32(n_cand, &top, x);
        top = std::max(top, sink);
        const double total = ggml_vec_soft_max_f32(n_cand, x, x, top) + std::exp(sink - top);
        ggml_vec_scale_f32(n_cand, x, (float) (1.0/total));
    }
    team.barrier();

    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        float * mean = A + h*stride;
        std::fill(mean, mean + pad_n(), 0.0f);
        for (int i = 0; i < n_query; ++i) {
            ggml_vec_mad_f32(n_cand, mean, logits + ((size_t) h*par.window + i)*stride, 1.0f/n_query);
        }
    }
    team.barrier();
}

void rkv_scorer::importance(float * I) {
    attention(tmp[0]);

    const size_t stride = n_max_pad;
    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        const float * mean = tmp[0] + h*stride;
        float * Ih = I + h*stride;
        const int reach = par.pool/2;
        for (int j = 0; j < n_cand; ++j) {
            const int lo = std::max(0, j - reach), hi = std::min(n_cand - 1, j + reach);
            Ih[j] = *std::max_element(mean + lo, mean + hi + 1);
        }
        std::fill(Ih + n_cand, Ih + pad_n(), 0.0f);
    }
    team.barrier();
}

void rkv_scorer::remember(float * I, int slot) {
    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        float * Ih = I + (size_t) h*n_max_pad;
        for (int j = 0; j < n; ++j) {
            float & stored = aux[h*aux_head + (size_t) j*n_aux + slot];
            const float before = j < n_old ? stored : 0.0f;
            if (j < n_cand) {
                Ih[j] = j < n_old ? std::max(Ih[j], par.memory*before) : Ih[j];
            }
            stored = j < n_cand ? Ih[j] : before;
        }
    }
    team.barrier();
}

void rkv_scorer::layer_attention(float * z, size_t z_head) {
    load_keys(RAW);

    const size_t stride = n_max_pad;
    const int    n_rpad = pad_to(par.window*n_group + 3, 4);
    const int    np     = (n_cand + RKV_PANEL - 1)/RKV_PANEL;
    const int    n_free = n_cand - pin; // cells that the attention is paid to

    // queries of a KV head as columns: r = g*n_query + i
    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        float * dst = queries + (size_t) h*n_embd*n_rpad;
        for (int r = 0; r < n_rpad; ++r) {
            const float * q = r < n_query*n_group ? query[r%n_query] + ((size_t) h*n_group + r/n_query)*n_embd : nullptr;
            for (int i = 0; i < n_embd; ++i) {
                dst[(size_t) i*n_rpad + r] = q ? q[i] : 0.0f;
            }
        }
        std::fill(tmp[0] + h*stride, tmp[0] + h*stride + pad_n(), 0.0f);
    }
    team.barrier();

    for (int g = 0; g < n_group && n_free > 0; ++g) {
        for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
            const int h = it/np, b = it%np;
            float * lh = logits + (size_t) h*par.window*stride;
            for (int i0 = 0; i0 < n_query; i0 += 4) {
                float out[4][RKV_PANEL];
                dot_4x16(n_embd, queries + (size_t) h*n_embd*n_rpad + g*n_query + i0, n_rpad, panel(h, b), out);
                for (int i = i0; i < std::min(i0 + 4, n_query); ++i) {
                    memcpy(lh + i*stride + b*RKV_PANEL, out[i - i0], sizeof(out[0]));
                }
            }
        }
        team.barrier();
        for (int h = team.ith; h < n_head_kv; h += team.nth) {
            for (int i = 0; i < n_query; ++i) {
                float * x = logits + ((size_t) h*par.window + i)*stride + pin;
                ggml_vec_scale_f32(n_free, x, par.scale);
                soft_cap(x, n_free, par.softcap);
                const float sink = sinks ? sinks[h*n_group + g] : -INFINITY;
                float top = -INFINITY;
                ggml_vec_max_f32(n_free, &top, x);
                top = std::max(top, sink);
                const double total = ggml_vec_soft_max_f32(n_free, x, x, top) + std::exp(sink - top);
                ggml_vec_mad_f32(n_free, tmp[0] + h*stride + pin, x, (float) (1.0/(total*n_query*n_group*n_head_kv)));
            }
        }
        team.barrier();
    }

    const int reach = par.pool/2;
    for (int h = team.ith; h < n_head_kv; h += team.nth) { // each the same
        float * mean = tmp[1] + h*stride;
        std::fill(mean, mean + n_cand, 0.0f);
        for (int other = 0; other < n_head_kv; ++other) {
            ggml_vec_add_f32(n_cand, mean, mean, tmp[0] + other*stride);
        }
        for (int j = 0; j < n_cand; ++j) {
            double total = 0.0;
            for (int i = std::max(pin, j - reach); i <= std::min(n_cand - 1, j + reach); ++i) {
                total += mean[i];
            }
            z[h*z_head + j] = j < pin ? 0.0f : (float) (total/par.pool);
        }
    }
    team.barrier();
}

//
// redundancy: column means of the cosines, the most recent copy of each key spared
//
// sum_i c[i,j] = k_j . sum_i k_i - k_j . k_j is linear in n; only the copy p(i) is searched, from the newest panel back.
//

void rkv_scorer::search_copies(int h, int b) {
    const size_t stride = n_max_pad;
    int32_t * ph = copy + h*stride;
    float   * ch = norm + h*stride; // the lengths are no longer needed: cosine to the copy

    for (int r0 = 0; r0 < RKV_PANEL && b*RKV_PANEL + r0 < n; r0 += 4) {
        int found = 0;
        const int i0   = b*RKV_PANEL + r0;
        const int rows = std::min(4, n - i0);
        for (int r = 0; r < rows; ++r) {
            ph[i0 + r] = -1;
            ch[i0 + r] = 0.0f;
        }
        for (int c = n_panel() - 1; c >= 0 && found < rows; --c) {
            float out[4][RKV_PANEL];
            dot_4x16(n_embd, panel(h, b) + r0, RKV_PANEL, panel(h, c), out);
            for (int r = 0; r < rows; ++r) {
                const int i = i0 + r;
                if (ph[i] >= 0) {
                    continue;
                }
                if (c == b) {
                    out[r][r0 + r] = 0.0f; // the diagonal is 0
                }
                for (int l = std::min(RKV_PANEL, n - c*RKV_PANEL) - 1; l >= 0; --l) {
                    if (out[r][l] > par.threshold) {
                        ph[i] = c*RKV_PANEL + l;
                        ch[i] = out[r][l];
                        ++found;
                        break;
                    }
                }
                if (ph[i] < 0 && c == 0 && (par.flags & RKV_FLAG_REFERENCE)) {
                    ph[i] = 0; // the authors' code zeroes column 0 where there is no copy
                    ch[i] = out[r][0];
                }
            }
        }
    }
}

void rkv_scorer::sum_keys() {
    const int np = n_panel();
    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        for (int i = 0; i < n_embd; ++i) {
            float lane[RKV_PANEL] = {};
            for (int b = 0; b < np; ++b) {
                const float * src = panel(h, b) + i*RKV_PANEL;
                for (int l = 0; l < RKV_PANEL; ++l) {
                    lane[l] += src[l];
                }
            }
            float total = 0.0f;
            for (float x : lane) {
                total += x;
            }
            sum[(size_t) h*n_embd + i] = total;
        }
    }
    team.barrier();
}

void rkv_scorer::redundancy(float * R) {
    normalise_keys();

    const size_t stride = n_max_pad;
    const int    np     = n_panel();

    sum_keys();

    for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
        const int h = it/np, b = it%np;
        const float * kb = panel(h, b);
        float col[RKV_PANEL] = {};
        for (int i = 0; i < n_embd; ++i) {
            const float total = sum[(size_t) h*n_embd + i];
            for (int l = 0; l < RKV_PANEL; ++l) {
                const float x = kb[i*RKV_PANEL + l];
                col[l] += x*(total - x);
            }
        }
        memcpy(tmp[0] + h*stride + b*RKV_PANEL, col, sizeof(col));
        search_copies(h, b);
    }
    team.barrier();

    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        float * m = tmp[0] + h*stride;
        for (int i = 0; i < n; ++i) {
            const int32_t p = copy[h*stride + i];
            if (p >= 0) {
                m[p] -= norm[h*stride + i];
            }
        }
        ggml_vec_scale_f32(n, m, 1.0f/n);
        float top = -INFINITY;
        ggml_vec_max_f32(n, &top, m);
        float * Rh = R + h*stride;
        const double total = ggml_vec_soft_max_f32(n, Rh, m, top);
        ggml_vec_scale_f32(n, Rh, (float) (1.0/total));
    }
    team.barrier();
}

//
// similarity to later keys: static, so the highest few are stored with the cell and only new keys are compared
//

static void keep_highest(float * best, int count, float x) {
    for (int s = 0; s < count; ++s) {
        if (x > best[s]) {
            std::swap(x, best[s]);
        }
    }
}

void rkv_scorer::later_similarity(float * L) {
    load_keys(UNROTATED);
    normalise_keys();

    const size_t stride = n_max_pad;
    const int    np     = n_panel();

    for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
        const int h = it/np, b = it%np;
        for (int r0 = 0; r0 < RKV_PANEL && b*RKV_PANEL + r0 < n; r0 += 4) {
            const int i0   = b*RKV_PANEL + r0;
            const int rows = std::min(4, n - i0);
            for (int r = 0; r < rows; ++r) {
                if (i0 + r >= n_old) {
                    std::fill_n(aux + h*aux_head + (size_t) (i0 + r)*n_aux, par.n_sim, -1.0f);
                }
            }
            for (int c = std::max(b, n_old/RKV_PANEL); c < np; ++c) {
                float out[4][RKV_PANEL];
                dot_4x16(n_embd, panel(h, b) + r0, RKV_PANEL, panel(h, c), out);
                const int c0 = c*RKV_PANEL;
                for (int r = 0; r < rows; ++r) {
                    const int i     = i0 + r;
                    const int first = std::max({0, i + 1 - c0, n_old - c0});
                    const int last  = std::min(RKV_PANEL, n - c0);
                    float * best = aux + h*aux_head + (size_t) i*n_aux;
                    for (int l = first; l < last; ++l) {
                        if (out[r][l] > best[par.n_sim - 1]) {
                            keep_highest(best, par.n_sim, out[r][l]);
                        }
                    }
                }
            }
            for (int r = 0; r < rows; ++r) {
                const float * best = aux + h*aux_head + (size_t) (i0 + r)*n_aux;
                float total = 0.0f;
                for (int s = 0; s < par.n_sim; ++s) {
                    total += best[s];
                }
                L[h*stride + i0 + r] = total/par.n_sim;
            }
        }
    }
    team.barrier();
}

//
// keys and values by themselves
//

void rkv_scorer::key_difference(float * z, size_t z_head) {
    load_keys(RAW);
    normalise_keys();
    sum_keys();

    const int np = n_panel();
    for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
        const int h = it/np, b = it%np;
        const float * total = sum + (size_t) h*n_embd;
        float sq = 0.0f, col[RKV_PANEL] = {};
        ggml_vec_dot_f32(n_embd, &sq, 0, total, 0, total, 0, 1);
        for (int i = 0; i < n_embd; ++i) {
            for (int l = 0; l < RKV_PANEL; ++l) {
                col[l] += panel(h, b)[i*RKV_PANEL + l]*total[i];
            }
        }
        const float inv = 1.0f/(std::sqrt(sq) + 1e-8f);
        for (int l = 0; l < RKV_PANEL && b*RKV_PANEL + l < n_cand; ++l) {
            z[h*z_head + b*RKV_PANEL + l] = -col[l]*inv;
        }
    }
    team.barrier();
}

void rkv_scorer::lag_deviation(float * S, int n_chunk, bool of_values) {
    const int d       = of_values ? n_embd_v : n_embd;
    const int n_lag   = (n - pin)/n_chunk - 1; // chunks that a whole one follows
    float *   least   = row + d, * most = row + 2*d;
    const auto load   = [&](int h, int j) { of_values ? value_row(h, j, row) : key_row(h, j, row); };

    for (int it = team.ith; it < n_head_kv*n_lag; it += team.nth) {
        const int h = it/n_lag, first = pin + it%n_lag*n_chunk;
        std::fill_n(least, d, INFINITY);
        std::fill_n(most, d, -INFINITY);
        for (int j = first + n_chunk; j < first + 2*n_chunk; ++j) {
            load(h, j);
            for (int i = 0; i < d; ++i) {
                least[i] = std::min(least[i], row[i]);
                most [i] = std::max(most [i], row[i]);
            }
        }
        for (int j = first; j < first + n_chunk; ++j) {
            load(h, j);
            double total = 0.0, sq = 0.0;
            for (int i = 0; i < d; ++i) {
                const float range = most[i] - least[i];
                row[i] = range > 0.0f ? (row[i] - least[i])/range : 0.0f;
                total += row[i];
            }
            for (int i = 0; i < d; ++i) {
                sq += (row[i] - total/d)*(row[i] - total/d);
            }
            S[(size_t) h*n_max_pad + j] = (float) std::sqrt(sq/std::max(1, d - 1));
        }
    }
    team.barrier();
}

void rkv_scorer::value_lengths(float * N) {
    for (int it = team.ith; it < n_head_kv*n; it += team.nth) {
        const int h = it/n, j = it%n;
        value_row(h, j, row);
        float sq = 0.0f;
        ggml_vec_dot_f32(n_embd_v, &sq, 0, row, 0, row, 0, 1);
        N[(size_t) h*n_max_pad + j] = std::sqrt(sq);
    }
    team.barrier();
}

void rkv_scorer::value_distances(float * D) {
    float * mean = row + n_embd_v;
    std::vector<double> total(n_embd_v);
    for (int h = team.ith; h < n_head_kv; h += team.nth) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int j = 0; j < n; ++j) {
            value_row(h, j, row);
            for (int i = 0; i < n_embd_v; ++i) {
                total[i] += row[i];
            }
        }
        for (int i = 0; i < n_embd_v; ++i) {
            mean[i] = (float) (total[i]/n);
        }
        for (int j = 0; j < n; ++j) {
            value_row(h, j, row);
            ggml_vec_sub_f32(n_embd_v, row, row, mean);
            float sq = 0.0f;
            ggml_vec_dot_f32(n_embd_v, &sq, 0, row, 0, row, 0, 1);
            D[(size_t) h*n_max_pad + j] = std::sqrt(sq);
        }
    }
    team.barrier();
}

//
// triattention
//
// A cached key is rotated to its position. Its product with the mean query, rotated to a position ahead and averaged over
// these, is the trigonometric series of its distance: the average of the rotations is one complex number per pair.
//

// the elements of pair f
static void pair_of(const rkv_op_params & par, int f, int & a, int & b) {
    const bool neox = par.flags & RKV_FLAG_ROPE_NEOX;
    a = par.rope_begin + (neox ? f : 2*f);
    b = par.rope_begin + (neox ? f + par.n_rot/2 : 2*f + 1);
}

void rkv_scorer::gather_statistics() {
    for (int head = team.ith; head < n_head_kv*n_group; head += team.nth) {
        float * mean = stats + head*n_stats, * length = mean + n_embd, & count = mean[n_stats - 1];
        if (n_old == 0) {
            std::fill_n(mean, n_stats, 0.0f);
        }
        for (int i = 0; i < n_query; ++i) {
            if (query_pos[i] < 0) {
                continue;
            }
            memcpy(row, query[i] + (size_t) head*n_embd, n_embd*sizeof(float));
            rkv_undo_rotation(par, row, n_embd, query_pos[i], rope, rope_row);
            count += 1.0f;
            for (int e = 0; e < n_embd; ++e) {
                mean[e] += (row[e] - mean[e])/count;
            }
            for (int f = 0; f < par.n_rot/2; ++f) {
                int a, b;
                pair_of(par, f, a, b);
                length[f] += (std::sqrt(row[a]*row[a] + row[b]*row[b]) - length[f])/count;
            }
        }
    }
    team.barrier();
}

void rkv_scorer::trigonometric(float * z, size_t z_head) {
    load_keys(PLAIN);

    const int half = rope ? par.n_rot/2 : 0;
    const int np   = (n_cand + RKV_PANEL - 1)/RKV_PANEL;
    for (int g = 0; g < n_group; ++g) {
        // the mean query ahead, and what each pair's length counts for
        for (int h = team.ith; h < n_head_kv; h += team.nth) {
            const float * mean = stats + (h*n_group + g)*n_stats, * length = mean + n_embd;
            float * q = queries + (size_t) h*n_embd*4, * weight = sum + (size_t) h*n_embd;
            std::fill_n(q, n_embd*4, 0.0f);
            for (int e = 0; e < n_embd; ++e) {
                q[4*e] = mean[e];
            }
            const int last = pos[h*pos_head + n - 1];
            const auto turn = [&](int p, int f, double & c, double & s) {
                const float * lo = rope + (p % RKV_ROPE_LO)*rope_row, * hi = rope + (RKV_ROPE_LO + p/RKV_ROPE_LO)*rope_row;
                c = (double) lo[f]*hi[f] - (double) lo[half + f]*hi[half + f];
                s = (double) lo[half + f]*hi[f] + (double) lo[f]*hi[half + f];
            };
            for (int f = 0; f < half; ++f) {
                double c = 0.0, s = 0.0, c1, s1, c0, s0;
                for (int m = 0; m < RKV_TRI_OFFSETS; ++m) {
                    turn(1 << m, f, c1, s1);
                    c += c1/RKV_TRI_OFFSETS;
                    s += s1/RKV_TRI_OFFSETS;
                }
                turn(last, f, c0, s0);
                const double cs = (c*c0 - s*s0)*par.rope_mscale, sn = (s*c0 + c*s0)*par.rope_mscale;
                int a, b;
                pair_of(par, f, a, b);
                q[4*a] = (float) (mean[a]*cs - mean[b]*sn);
                q[4*b] = (float) (mean[a]*sn + mean[b]*cs);
                weight[f] = par.rope_mscale*std::max(0.0f, length[f] - std::sqrt(mean[a]*mean[a] + mean[b]*mean[b]));
            }
        }
        team.barrier();

        for (int it = team.ith; it < n_head_kv*np; it += team.nth) {
            const int h = it/np, b = it%np;
            const float * kb = panel(h, b), * weight = sum + (size_t) h*n_embd;
            float out[4][RKV_PANEL];
            dot_4x16(n_embd, queries + (size_t) h*n_embd*4, 4, kb, out);
            for (int f = 0; f < half; ++f) {
                int x, y;
                pair_of(par, f, x, y);
                for (int l = 0; l < RKV_PANEL; ++l) {
                    const float kx = kb[x*RKV_PANEL + l], ky = kb[y*RKV_PANEL + l];
                    out[0][l] += weight[f]*std::sqrt(kx*kx + ky*ky);
                }
            }
            memcpy(tmp[0] + (size_t) h*n_max_pad + b*RKV_PANEL, out[0], sizeof(out[0]));
        }
        team.barrier();

        for (int h = team.ith; h < n_head_kv; h += team.nth) {
            const float * x = tmp[0] + (size_t) h*n_max_pad;
            double total = 0.0, sq = 0.0;
            for (int j = pin; j < n_cand; ++j) {
                total += x[j];
            }
            const double mean = total/std::max(1, n_cand - pin);
            for (int j = pin; j < n_cand; ++j) {
                sq += (x[j] - mean)*(x[j] - mean);
            }
            const double dev = std::sqrt(sq/std::max(1, n_cand - pin));
            for (int j = 0; j < n_cand; ++j) {
                const float s = j < pin || dev == 0.0 ? 0.0f : (float) ((x[j] - mean)/dev);
                z[h*z_head + j] = g == 0 ? s : std::max(z[h*z_head + j], s);
            }
        }
        team.barrier();
    }
}
