#include "rkv-scorer.h"
#include "rkv-unrotate.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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
    queries = take((size_t) n_head_kv*n_embd*pad_to(par.window*n_group, 4));
    logits  = take(cells*par.window);
    norm    = take(cells);
    for (auto & t : tmp) {
        t = take(cells);
    }
    sum  = take((size_t) n_head_kv*n_embd);
    copy = (int32_t *) take(cells);
    row  = take((size_t) 2*n_embd*nth);
    if (base) {
        row += (size_t) 2*n_embd*team.ith;
    }
    return used;
}

//
// keys
//

void rkv_scorer::load_keys(key_form form) {
    const auto to_float = ggml_get_type_traits((ggml_type) k_type)->to_float;
    const int  np       = n_panel();

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
            const char * src = k + h*k_head + j*k_cell;
            if (k_type == GGML_TYPE_F32) {
                memcpy(row, src, n_embd*sizeof(float));
            } else if (k_type == GGML_TYPE_F16) {
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, row, n_embd);
            } else {
                to_float(src, row, n_embd);
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

//
// importance: mean over the window's queries of the softmax over the candidates, max-pooled
//

void rkv_scorer::importance(float * I) {
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
        if (par.softcap > 0.0f) {
            for (int j = 0; j < n_cand; ++j) {
                x[j] = par.softcap*std::tanh(x[j]/par.softcap);
            }
        }
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
        float * mean = tmp[0] + h*stride;
        std::fill(mean, mean + n_cand, 0.0f);
        for (int i = 0; i < n_query; ++i) {
            ggml_vec_mad_f32(n_cand, mean, logits + ((size_t) h*par.window + i)*stride, 1.0f/n_query);
        }
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

void rkv_scorer::redundancy(float * R) {
    normalise_keys();

    const size_t stride = n_max_pad;
    const int    np     = n_panel();

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
