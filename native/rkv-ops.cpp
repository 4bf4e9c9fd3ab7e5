#include "rkv-ops.h"

#include <cstring>

static_assert(sizeof(rkv_op_params) <= GGML_MAX_OP_PARAMS, "the parameters must fit into a node");

static ggml_tensor * rkv_node(ggml_tensor * node, rkv_sub_op sub_op, const rkv_op_params * par) {
    rkv_op_params p = *par;
    p.sub_op = sub_op;
    memcpy(node->op_params, &p, sizeof(p));
    node->op = GGML_OP_RKV;
    return node;
}

ggml_tensor * ggml_rkv_positions(ggml_context * ctx, ggml_tensor * pos, ggml_tensor * new_pos, ggml_tensor * jobs,
        const rkv_op_params * par) {
    GGML_ASSERT(pos->type == GGML_TYPE_I32 && new_pos->type == GGML_TYPE_I32 && jobs->type == GGML_TYPE_I32);
    GGML_ASSERT(jobs->ne[0] == RKV_JOB_N);

    ggml_tensor * node = rkv_node(ggml_view_tensor(ctx, pos), RKV_SUB_OP_POSITIONS, par);
    node->src[0] = pos;
    node->src[1] = new_pos;
    node->src[2] = jobs;
    return node;
}

ggml_tensor * ggml_rkv_score(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, ggml_tensor * jobs,
        ggml_tensor * pos, ggml_tensor * aux, ggml_tensor * rope, const rkv_op_params * par) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && jobs->ne[0] == RKV_JOB_N);
    GGML_ASSERT(k->ne[0] % par->n_head_kv == 0);

    ggml_tensor * node = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k->ne[1], par->n_head_kv, jobs->ne[1]);
    rkv_node(node, RKV_SUB_OP_SCORE, par);
    node->src[0] = k;
    node->src[1] = q;
    node->src[2] = jobs;
    node->src[3] = pos;
    node->src[4] = aux;
    node->src[5] = rope;
    return node;
}

void ggml_rkv_score_add_sinks(ggml_tensor * score, ggml_tensor * sinks) {
    score->src[6] = sinks;
}

void ggml_rkv_score_add_values(ggml_tensor * score, ggml_tensor * v) {
    score->src[7] = v;
}

void ggml_rkv_score_add_stats(ggml_tensor * score, ggml_tensor * stats, ggml_tensor * q_pos) {
    score->src[8] = stats;
    score->src[9] = q_pos;
}

ggml_tensor * ggml_rkv_select(ggml_context * ctx, ggml_tensor * score, ggml_tensor * jobs, int64_t n_keep_max,
        const rkv_op_params * par) {
    GGML_ASSERT(score->type == GGML_TYPE_F32 && score->ne[2] == jobs->ne[1]);

    ggml_tensor * node = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_keep_max, score->ne[1], jobs->ne[1]);
    rkv_node(node, RKV_SUB_OP_SELECT, par);
    node->src[0] = score;
    node->src[1] = jobs;
    return node;
}

ggml_tensor * ggml_rkv_compact(ggml_context * ctx, ggml_tensor * data, ggml_tensor * idx, ggml_tensor * jobs,
        const rkv_op_params * par) {
    GGML_ASSERT(idx->type == GGML_TYPE_I32 && idx->ne[2] == jobs->ne[1]);
    GGML_ASSERT(idx->ne[1] == 1 || data->ne[2] % idx->ne[1] == 0);

    ggml_tensor * node = rkv_node(ggml_view_tensor(ctx, data), RKV_SUB_OP_COMPACT, par);
    node->src[0] = data;
    node->src[1] = idx;
    node->src[2] = jobs;
    return node;
}
