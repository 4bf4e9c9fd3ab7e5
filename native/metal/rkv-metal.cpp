#include "rkv-metal.h"

#include "rkv-metal-args.h"
#include "rkv-ops.h"
#include "rkv-policy.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

static_assert(RKV_METAL_JOB_STREAM == RKV_JOB_STREAM && RKV_METAL_JOB_BEGIN == RKV_JOB_BEGIN &&
    RKV_METAL_JOB_OLD_END == RKV_JOB_OLD_END && RKV_METAL_JOB_END == RKV_JOB_END && RKV_METAL_JOB_KEEP == RKV_JOB_KEEP &&
    RKV_METAL_JOB_DST == RKV_JOB_DST && RKV_METAL_JOB_SHIFT == RKV_JOB_SHIFT &&
    RKV_METAL_JOB_QUERY_LO == RKV_JOB_QUERY_LO && RKV_METAL_JOB_QUERY_HI == RKV_JOB_QUERY_HI &&
    RKV_METAL_JOB_PIN == RKV_JOB_PIN, "rkv-ops.h has changed");
static_assert(RKV_METAL_POLICY_RKV == RKV_POLICY_RKV && RKV_METAL_POLICY_SNAPKV == RKV_POLICY_SNAPKV &&
    RKV_METAL_POLICY_STREAMING == RKV_POLICY_STREAMING && RKV_METAL_POLICY_LATEST == RKV_POLICY_LATEST, "rkv-policy.h has changed");
static_assert(RKV_METAL_LOGISTIC_SCALE == RKV_LOGISTIC_SCALE && RKV_METAL_LEAST_VARIANCE == RKV_LEAST_VARIANCE, "rkv-ops.h has changed");
static_assert(RKV_METAL_FLAG_REFERENCE == RKV_FLAG_REFERENCE && RKV_METAL_FLAG_ROPE_NEOX == RKV_FLAG_ROPE_NEOX &&
    RKV_METAL_ROPE_LO == RKV_ROPE_LO && RKV_METAL_MAX_SIM == RKV_MAX_AUX, "rkv-ops.h has changed");

static constexpr size_t  THREADGROUP_MEMORY = 32768; // bytes, of every Apple GPU
static constexpr int64_t MAX_HEAD           = 1024;

static std::atomic<bool> have_kernels { true };

void rkv_metal_no_kernels() { have_kernels = false; }

static rkv_op_params params_of(const ggml_tensor * op) {
    rkv_op_params par;
    memcpy(&par, op->op_params, sizeof(par));
    return par;
}

static int cached_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:    return RKV_METAL_TYPE_F32;
        case GGML_TYPE_F16:    return RKV_METAL_TYPE_F16;
        case GGML_TYPE_BF16:   return RKV_METAL_TYPE_BF16;
        case GGML_TYPE_Q8_0:   return RKV_METAL_TYPE_Q8_0;
        case GGML_TYPE_Q4_0:   return RKV_METAL_TYPE_Q4_0;
        case GGML_TYPE_Q4_1:   return RKV_METAL_TYPE_Q4_1;
        case GGML_TYPE_Q5_0:   return RKV_METAL_TYPE_Q5_0;
        case GGML_TYPE_Q5_1:   return RKV_METAL_TYPE_Q5_1;
        case GGML_TYPE_IQ4_NL: return RKV_METAL_TYPE_IQ4_NL;
        default:               return -1;
    }
}

static bool supports_score(const ggml_tensor * op, const rkv_op_params & par) {
    return par.policy > RKV_POLICY_NONE && par.policy <= RKV_POLICY_LATEST && par.memory == 0.0f && rkv_score_is_sane(op, &par) &&
        cached_type(op->src[0]->type) >= 0 && op->src[0]->ne[0]/par.n_head_kv <= MAX_HEAD &&
        (!rkv_needs_values(&par) || (cached_type(op->src[7]->type) >= 0 && op->src[7]->ne[0] <= MAX_HEAD)) &&
        (par.policy != RKV_POLICY_LATEST || (op->src[4] && par.n_sim <= RKV_METAL_MAX_SIM));
}

// the largest words that a gather can move
static uint64_t word_size(const ggml_tensor * op, size_t offs) {
    const uint64_t all = ggml_row_size(op->type, op->ne[0]) | op->nb[1] | op->nb[2] | op->nb[3] | offs;
    return all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
}

bool rkv_metal_supports_op(const ggml_tensor * op, bool has_simdgroup_reduction) {
    const char * wanted = getenv("RKV_METAL_KERNELS");
    if (!has_simdgroup_reduction || !have_kernels || (wanted && strcmp(wanted, "0") == 0)) {
        return false;
    }
    const rkv_op_params par = params_of(op);
    switch (par.sub_op) {
        case RKV_SUB_OP_POSITIONS:
        case RKV_SUB_OP_SELECT:
            return true;
        case RKV_SUB_OP_COMPACT:
            return word_size(op, op->view_offs) >= 2;
        case RKV_SUB_OP_SCORE:
            return supports_score(op, par);
        default:
            return false;
    }
}

// floats per job and head; rkv-metal-args.h has the layout
static size_t slice_size(const ggml_tensor * op, const rkv_op_params & par) {
    const ggml_tensor * k = op->src[0];
    return par.policy == RKV_POLICY_STREAMING ? 0 :
        (size_t) (par.window + RKV_METAL_CELL_ARRAYS)*k->ne[1] + k->ne[0]/par.n_head_kv;
}

size_t rkv_metal_extra_size(const ggml_tensor * op) {
    const rkv_op_params par = params_of(op);
    return par.sub_op == RKV_SUB_OP_SCORE ? slice_size(op, par)*par.n_head_kv*op->ne[2]*sizeof(float) : 0;
}

//
// encoding
//

static ggml_metal_buffer_id buffer_of(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

namespace {

struct launcher {
    ggml_metal_library_t lib;
    ggml_metal_encoder_t enc;
    bool first = true;

    // arguments, then the buffers in the kernel's order; what a kernel reads was written by the one before it
    template<typename Args>
    void operator()(const char * name, Args args, std::initializer_list<ggml_metal_buffer_id> buffers, size_t shmem,
            int64_t tg0, int64_t tg1, int64_t tg2, int n_threads) {
        if (tg0 == 0 || tg1 == 0 || tg2 == 0) {
            return;
        }
        if (!first) {
            ggml_metal_encoder_memory_barrier(enc);
        }
        first = false;

        auto pipeline = ggml_metal_library_get_pipeline(lib, name);
        if (!pipeline.pipeline) {
            pipeline = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
        }
        ggml_metal_encoder_set_pipeline(enc, pipeline);
        ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
        int i = 1;
        for (const ggml_metal_buffer_id & buffer : buffers) {
            ggml_metal_encoder_set_buffer(enc, buffer, i++);
        }
        if (shmem > 0) {
            ggml_metal_encoder_set_threadgroup_memory_size(enc, (shmem + 15)/16*16, 0);
        }
        ggml_metal_encoder_dispatch_threadgroups(enc, tg0, tg1, tg2, n_threads, 1, 1);
    }
};

} // namespace

static int64_t blocks(int64_t n, int64_t size) { return (n + size - 1)/size; }

static void encode_score(launcher & launch, ggml_tensor * op, const rkv_op_params & par) {
    const ggml_tensor * k    = op->src[0];
    const ggml_tensor * q    = op->src[1];
    const ggml_tensor * jobs = op->src[2];
    const ggml_tensor * pos  = op->src[3];
    const ggml_tensor * aux  = op->src[4];
    const ggml_tensor * rope = op->src[5];

    const int64_t n_cells = k->ne[1];
    const int64_t n_head  = par.n_head_kv;
    const int64_t n_embd  = k->ne[0]/n_head;
    const int64_t n_jobs  = jobs->ne[1];

    rkv_metal_score_args args = {};
    args.k_head     = ggml_row_size(k->type, n_embd);
    args.k_cell     = k->nb[1];
    args.k_stream   = k->nb[2];
    args.q_slot     = q->nb[1];
    args.q_stream   = q->nb[2];
    args.job_size   = jobs->nb[1];
    args.pos_head   = pos->nb[1];
    args.pos_stream = pos->nb[2];
    if (aux) {
        args.aux_cell   = aux->nb[1];
        args.aux_head   = aux->nb[2];
        args.aux_stream = aux->nb[3];
    }
    args.z_head     = op->nb[1];
    args.z_job      = op->nb[2];
    args.slice      = slice_size(op, par);
    args.k_type     = cached_type(k->type);
    args.policy     = par.policy;
    args.flags      = par.flags;
    args.n_head_kv  = par.n_head_kv;
    args.n_group    = q->ne[0]/k->ne[0];
    args.n_embd     = n_embd;
    args.n_cells    = n_cells;
    args.window     = par.window;
    args.pool       = par.pool;
    args.n_sim      = par.n_sim;
    args.n_hadamard = par.n_hadamard;
    args.n_rot      = rope ? par.n_rot : 0;
    args.rope_row   = rope ? rope->nb[1]/sizeof(float) : 0;
    args.lambda     = par.lambda;
    args.threshold  = par.threshold;
    args.scale      = par.scale;
    args.softcap    = par.softcap;
    args.rope_unit  = 1.0f/par.rope_mscale;

    const ggml_metal_buffer_id dst = buffer_of(op);
    ggml_metal_buffer_id scratch = dst;
    scratch.offs += ggml_nbytes(op);

    const ggml_metal_buffer_id bk = buffer_of(k), bq = buffer_of(q), bj = buffer_of(jobs);

    const size_t row     = n_embd*sizeof(float);
    const size_t reduce  = RKV_METAL_THREADS/RKV_METAL_SIMD*sizeof(float);
    const auto   fitting = [](int nsg, auto && size) {
        while (nsg > 1 && size(nsg) > THREADGROUP_MEMORY) {
            nsg /= 2;
        }
        return nsg;
    };

    // rows of the cosine matrix and columns held by a threadgroup, with what a simdgroup notes for each row
    const auto block_size = [&](int n_row, int nsg) {
        return (n_row + nsg)*row + (size_t) nsg*n_row*std::max<size_t>(2, par.n_sim)*sizeof(float);
    };
    int n_row = 16;
    while (n_row > 1 && block_size(n_row, 4) > THREADGROUP_MEMORY) {
        n_row /= 2;
    }

    const bool streaming = par.policy == RKV_POLICY_STREAMING;
    if (!streaming) {
        const auto size = [&](int nsg) { return nsg*RKV_METAL_KEYS*row; };
        args.nsg = fitting(4, size);
        launch("kernel_rkv_logits", args, { bk, bq, bj, scratch }, size(args.nsg),
            blocks(n_cells, args.nsg*RKV_METAL_KEYS), n_head, n_jobs, args.nsg*RKV_METAL_SIMD);
        launch("kernel_rkv_softmax", args, { bj, scratch }, reduce, par.window, n_head, n_jobs, RKV_METAL_THREADS);
        launch("kernel_rkv_mean", args, { bj, scratch }, 0, blocks(n_cells, RKV_METAL_THREADS), n_head, n_jobs, RKV_METAL_THREADS);
    }
    if (par.policy == RKV_POLICY_RKV) {
        const auto size = [&](int nsg) { return nsg*2*row; };
        args.nsg = fitting(8, size);
        launch("kernel_rkv_key_sum", args, { bk, bj, scratch }, size(args.nsg), 1, n_head, n_jobs, args.nsg*RKV_METAL_SIMD);

        args.n_row = n_row;
        args.nsg   = 4;
        launch("kernel_rkv_copies", args, { bk, bj, scratch }, block_size(n_row, args.nsg),
            blocks(n_cells, n_row), n_head, n_jobs, args.nsg*RKV_METAL_SIMD);
        launch("kernel_rkv_column_means", args, { bj, scratch }, 2*RKV_METAL_THREADS*sizeof(float),
            blocks(n_cells, RKV_METAL_THREADS), n_head, n_jobs, RKV_METAL_THREADS);
    }
    if (par.policy == RKV_POLICY_LATEST) {
        args.n_row = n_row;
        args.nsg   = 4;
        launch("kernel_rkv_later", args, { bk, bj, buffer_of(pos), buffer_of(aux), rope ? buffer_of(rope) : bj, scratch },
            block_size(n_row, args.nsg), blocks(n_cells, n_row), n_head, n_jobs, args.nsg*RKV_METAL_SIMD);
    }
    launch("kernel_rkv_score", args, { bj, streaming ? dst : scratch, dst }, reduce, 1, n_head, n_jobs, RKV_METAL_THREADS);
    if (rkv_needs_values(&par)) {
        const ggml_tensor * v = op->src[7];
        args.v_el         = v->nb[0] == ggml_type_size(v->type) ? 0 : v->nb[0];
        args.v_cell       = v->nb[1];
        args.v_head       = v->nb[2];
        args.v_stream     = v->nb[3];
        args.v_type       = cached_type(v->type);
        args.n_embd_v     = v->ne[0];
        args.value_weight = par.value_weight;
        launch("kernel_rkv_values", args, { buffer_of(v), bj, scratch, dst }, reduce + v->ne[0]*sizeof(float),
            1, n_head, n_jobs, RKV_METAL_THREADS);
    }
}

static void encode_select(launcher & launch, ggml_tensor * op, const rkv_op_params & par) {
    const ggml_tensor * score = op->src[0];
    const ggml_tensor * jobs  = op->src[1];

    rkv_metal_select_args args = {};
    args.z_head   = score->nb[1];
    args.z_job    = score->nb[2];
    args.idx_head = op->nb[1];
    args.idx_job  = op->nb[2];
    args.job_size = jobs->nb[1];
    args.window   = par.window;
    launch("kernel_rkv_select", args, { buffer_of(score), buffer_of(jobs), buffer_of(op) },
        RKV_METAL_THREADS/RKV_METAL_SIMD*sizeof(uint32_t), 1, op->ne[1], jobs->ne[1], RKV_METAL_THREADS);
}

static void encode_compact(launcher & launch, ggml_tensor * op) {
    const ggml_tensor * idx  = op->src[1];
    const ggml_tensor * jobs = op->src[2];

    const ggml_metal_buffer_id data = buffer_of(op);
    const uint64_t word = word_size(op, data.offs);

    rkv_metal_compact_args args = {};
    args.step     = op->nb[1]/word;
    args.line     = op->nb[2]/word;
    args.stream   = op->nb[3]/word;
    args.idx_line = idx->nb[1];
    args.idx_job  = idx->nb[2];
    args.job_size = jobs->nb[1];
    args.unit     = ggml_row_size(op->type, op->ne[0])/word;
    args.ratio    = op->ne[2]/idx->ne[1];
    launch(word == 4 ? "kernel_rkv_compact_4" : "kernel_rkv_compact_2", args,
        { data, buffer_of(idx), buffer_of(jobs) }, 0, op->ne[2], jobs->ne[1], 1, RKV_METAL_THREADS);
}

static void encode_positions(launcher & launch, ggml_tensor * op) {
    const ggml_tensor * src  = op->src[1];
    const ggml_tensor * jobs = op->src[2];

    rkv_metal_positions_args args = {};
    args.pos_head   = op->nb[1];
    args.pos_stream = op->nb[2];
    args.src_job    = src->nb[1];
    args.job_size   = jobs->nb[1];
    launch("kernel_rkv_positions", args, { buffer_of(src), buffer_of(jobs), buffer_of(op) }, 0,
        op->ne[1], jobs->ne[1], 1, RKV_METAL_THREADS);
}

void rkv_metal_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, ggml_tensor * op) {
    launcher launch { lib, enc };
    const rkv_op_params par = params_of(op);
    switch (par.sub_op) {
        case RKV_SUB_OP_POSITIONS: encode_positions(launch, op);      break;
        case RKV_SUB_OP_SCORE:     encode_score    (launch, op, par); break;
        case RKV_SUB_OP_SELECT:    encode_select   (launch, op, par); break;
        case RKV_SUB_OP_COMPACT:   encode_compact  (launch, op);      break;
        default: break; // supports_op has refused it
    }
}
