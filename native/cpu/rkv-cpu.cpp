// GGML_OP_RKV on the CPU: the reference that every other backend is tested against.

#include "rkv-cpu.h"

#include "rkv-scorer.h"
#include "rkv-policy.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static rkv_op_params params_of(const ggml_tensor * node) {
    rkv_op_params par;
    memcpy(&par, node->op_params, sizeof(par));
    return par;
}

static const int32_t * job_of(const ggml_tensor * jobs, int64_t i) {
    return (const int32_t *) ((const char *) jobs->data + i*jobs->nb[1]);
}

static rkv_policy_fn policy_fn(int32_t policy) {
    switch (policy) {
        case RKV_POLICY_RKV:       return rkv_policy_rkv;
        case RKV_POLICY_SNAPKV:    return rkv_policy_snapkv;
        case RKV_POLICY_STREAMING: return rkv_policy_streaming;
        case RKV_POLICY_LATEST:    return rkv_policy_latest;
        case RKV_POLICY_H2O:       return rkv_policy_h2o;
        case RKV_POLICY_GKV:       return rkv_policy_gkv;
        case RKV_POLICY_RPC:       return rkv_policy_rpc;
        case RKV_POLICY_CHUNKKV:   return rkv_policy_chunkkv;
        case RKV_POLICY_VALUE_AWARE: return rkv_policy_value_aware;
        case RKV_POLICY_KEYDIFF:   return rkv_policy_keydiff;
        case RKV_POLICY_LAGKV:     return rkv_policy_lagkv;
        case RKV_POLICY_TRIATTENTION: return rkv_policy_triattention;
        case RKV_POLICY_GIVEN:     return rkv_policy_given;
        default: GGML_ABORT("rkv: no policy %d", policy); // refused when the context was created
    }
}

static void forward_positions(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src  = dst->src[1];
    const ggml_tensor * jobs = dst->src[2];

    const int64_t n_head = dst->ne[1];
    for (int64_t it = params->ith; it < n_head*jobs->ne[1]; it += params->nth) {
        const int64_t   h   = it%n_head;
        const int32_t * job = job_of(jobs, it/n_head);
        const int32_t * from = (const int32_t *) ((const char *) src->data + (it/n_head)*src->nb[1]) + job[RKV_JOB_SHIFT];
        int32_t *       to   = (int32_t *) ((char *) dst->data + h*dst->nb[1] + job[RKV_JOB_STREAM]*dst->nb[2]);
        std::copy(from + job[RKV_JOB_OLD_END], from + job[RKV_JOB_END], to + job[RKV_JOB_OLD_END]);
    }
}

static rkv_scorer scorer_of(const ggml_tensor * dst, const rkv_op_params & par, rkv_team team) {
    const ggml_tensor * k   = dst->src[0];
    const ggml_tensor * q   = dst->src[1];
    const ggml_tensor * aux = dst->src[4];

    rkv_scorer s(par, team);
    s.n_head_kv = par.n_head_kv;
    s.n_embd    = k->ne[0]/par.n_head_kv;
    s.n_group   = q->ne[0]/k->ne[0];
    s.k_type    = k->type;
    s.k_head    = ggml_row_size(k->type, s.n_embd);
    s.k_cell    = k->nb[1];
    s.n_aux     = aux ? aux->ne[0] : 0;
    if (const ggml_tensor * v = dst->src[7]) {
        s.v_type   = v->type;
        s.v_el     = v->nb[0];
        s.v_cell   = v->nb[1];
        s.v_head   = v->nb[2];
        s.n_embd_v = v->ne[0];
    }
    s.n_stats   = dst->src[8] ? dst->src[8]->ne[0] : 0;
    return s;
}

static void forward_score(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k    = dst->src[0];
    const ggml_tensor * q    = dst->src[1];
    const ggml_tensor * jobs = dst->src[2];
    const ggml_tensor * pos  = dst->src[3];
    const ggml_tensor * aux  = dst->src[4];
    const ggml_tensor * rope = dst->src[5];
    const ggml_tensor * sinks = dst->src[6];
    const ggml_tensor * v     = dst->src[7];
    const ggml_tensor * stats = dst->src[8];
    const ggml_tensor * q_pos = dst->src[9];

    const rkv_op_params par = params_of(dst);
    rkv_scorer s = scorer_of(dst, par, { params->ith, params->nth, params->threadpool });
    s.layout((float *) params->wdata, (int) k->ne[1], params->nth);

    for (int64_t i = 0; i < jobs->ne[1]; ++i) {
        const int32_t * job = job_of(jobs, i);
        const int64_t strm  = job[RKV_JOB_STREAM];
        const int64_t begin = job[RKV_JOB_BEGIN];

        s.n      = job[RKV_JOB_END] - begin;
        s.n_old  = job[RKV_JOB_OLD_END] - begin;
        s.n_cand = std::max(0, s.n - par.window);
        s.pin    = job[RKV_JOB_PIN];
        s.n_keep = job[RKV_JOB_KEEP];
        s.k      = (const char *) k->data + strm*k->nb[2] + begin*k->nb[1];
        s.pos    = (const int32_t *) ((const char *) pos->data + strm*pos->nb[2]) + begin;
        s.pos_head = pos->nb[1]/sizeof(int32_t);
        if (aux) {
            s.aux      = (float *) ((char *) aux->data + strm*aux->nb[3] + begin*aux->nb[1]);
            s.aux_head = aux->nb[2]/sizeof(float);
        }
        if (rope) {
            s.rope     = (const float *) rope->data;
            s.rope_row = rope->nb[1]/sizeof(float);
        }
        if (v) {
            s.v = (const char *) v->data + strm*v->nb[3] + begin*v->nb[1];
        }
        if (stats) {
            s.stats = (float *) ((char *) stats->data + strm*stats->nb[2]);
        }
        s.sinks   = sinks ? (const float *) sinks->data : nullptr;
        s.n_query = 0;
        const uint64_t slots = (uint32_t) job[RKV_JOB_QUERY_LO] | (uint64_t) (uint32_t) job[RKV_JOB_QUERY_HI] << 32;
        for (int slot = 0; slot < par.window; ++slot) {
            if (slots >> slot & 1) {
                s.query_pos[s.n_query] = q_pos ? ((const int32_t *) ((const char *) q_pos->data + i*q_pos->nb[1]))[slot] : -1;
                s.query[s.n_query++] = (const float *) ((const char *) q->data + strm*q->nb[2] + slot*q->nb[1]);
            }
        }
        float * z = (float *) ((char *) dst->data + i*dst->nb[2]);
        if (s.n_cand > 0) {
            policy_fn(par.policy)(s, z, dst->nb[1]/sizeof(float));
        }
        s.team.barrier(); // the scratch is used again
    }
}

static void forward_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * score = dst->src[0];
    const ggml_tensor * jobs  = dst->src[1];
    const rkv_op_params par = params_of(dst);

    const int64_t n_head = dst->ne[1];
    const int64_t n_max  = score->ne[0];
    int32_t * cand = (int32_t *) params->wdata + 2*n_max*params->ith;
    float   * zc   = (float *) (cand + n_max);

    for (int64_t it = params->ith; it < n_head*jobs->ne[1]; it += params->nth) {
        const int64_t   h   = it%n_head;
        const int32_t * job = job_of(jobs, it/n_head);
        const float   * z   = (const float *) ((const char *) score->data + h*score->nb[1] + (it/n_head)*score->nb[2]);
        int32_t       * out = (int32_t *) ((char *) dst->data + h*dst->nb[1] + (it/n_head)*dst->nb[2]);

        const int begin = job[RKV_JOB_BEGIN];
        const int n     = job[RKV_JOB_END] - begin;
        const int keep  = job[RKV_JOB_KEEP];
        if (keep >= n) {
            for (int j = 0; j < n; ++j) {
                out[j] = begin + j;
            }
            continue;
        }
        const int pin    = job[RKV_JOB_PIN];
        const int n_cand = n - par.window - pin;
        const int n_top  = keep - par.window - pin;
        for (int j = 0; j < n_cand; ++j) {
            cand[j] = pin + j;
            zc[j]   = std::isnan(z[pin + j]) ? -INFINITY : z[pin + j];
        }
        const auto above = [zc, pin](int32_t a, int32_t b) {
            const float za = zc[a - pin], zb = zc[b - pin];
            return za > zb || (za == zb && a < b);
        };
        std::nth_element(cand, cand + n_top, cand + n_cand, above);
        std::sort(cand, cand + n_top);

        int32_t * at = out;
        for (int j = 0; j < pin; ++j) {
            *at++ = begin + j;
        }
        for (int j = 0; j < n_top; ++j) {
            *at++ = begin + cand[j];
        }
        for (int j = n - par.window; j < n; ++j) {
            *at++ = begin + j;
        }
    }
}

// Rows only move towards the front and are taken in ascending order, so that nothing is overwritten before it is read.
static void forward_compact(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * idx  = dst->src[1];
    const ggml_tensor * jobs = dst->src[2];

    const int64_t n_line = dst->ne[2]; // heads, or head elements where V is transposed
    const int64_t ratio  = n_line/idx->ne[1];
    const size_t  unit   = ggml_row_size(dst->type, dst->ne[0]);
    const size_t  step   = dst->nb[1];

    // neighbouring lines share cache lines of the cells' rows: give each thread a contiguous range of them
    const int64_t n_all = n_line*jobs->ne[1];
    const int64_t it0 = n_all*params->ith/params->nth, it1 = n_all*(params->ith + 1)/params->nth;

    for (int64_t it = it0; it < it1; ++it) {
        const int64_t   line = it%n_line;
        const int32_t * job  = job_of(jobs, it/n_line);
        const int32_t * rows = (const int32_t *) ((const char *) idx->data + (line/ratio)*idx->nb[1] + (it/n_line)*idx->nb[2]);
        char * base = (char *) dst->data + line*dst->nb[2] + job[RKV_JOB_STREAM]*dst->nb[3];
        const int n   = std::min(job[RKV_JOB_KEEP], job[RKV_JOB_END] - job[RKV_JOB_BEGIN]);
        char *    to  = base + job[RKV_JOB_DST]*step;

        if (unit == step) { // whole runs at once
            for (int r = 0; r < n;) {
                int e = r + 1;
                while (e < n && rows[e] == rows[e - 1] + 1) {
                    ++e;
                }
                memmove(to + r*step, base + rows[r]*step, (e - r)*step);
                r = e;
            }
        } else if (unit == sizeof(uint16_t)) {
            for (int r = 0; r < n; ++r) {
                memmove(to + r*step, base + rows[r]*step, sizeof(uint16_t));
            }
        } else {
            for (int r = 0; r < n; ++r) {
                if (to + r*step != base + rows[r]*step) {
                    memcpy(to + r*step, base + rows[r]*step, unit);
                }
            }
        }
    }
}

void ggml_compute_forward_rkv(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (params_of(dst).sub_op) {
        case RKV_SUB_OP_POSITIONS: forward_positions(params, dst); break;
        case RKV_SUB_OP_SCORE:     forward_score    (params, dst); break;
        case RKV_SUB_OP_SELECT:    forward_select   (params, dst); break;
        case RKV_SUB_OP_COMPACT:   forward_compact  (params, dst); break;
        default: GGML_ABORT("rkv: no sub-op");
    }
}

size_t ggml_rkv_work_size(const ggml_tensor * dst, int n_tasks) {
    const rkv_op_params par = params_of(dst);
    switch (par.sub_op) {
        case RKV_SUB_OP_SCORE:
            return scorer_of(dst, par, { 0, n_tasks, nullptr }).layout(nullptr, (int) dst->src[0]->ne[1], n_tasks)*sizeof(float);
        case RKV_SUB_OP_SELECT:
            return 2*dst->src[0]->ne[0]*sizeof(float)*n_tasks;
        default:
            return 0;
    }
}
