#if defined(__APPLE__) && !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 700 // ucontext
#endif
#undef _FORTIFY_SOURCE // a jump to another stack is meant

#include "emulator.h"
#include "kernels.h"

#include "rkv-metal.h"

#include "ggml-backend-impl.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

static constexpr int    SIMD           = 32;
static constexpr int    MAX_THREADS    = 1024;
static constexpr size_t MAX_SHARED     = 32768; // bytes of threadgroup memory
static constexpr size_t STACK_SIZE     = 64*1024;
static constexpr size_t GUARD_SIZE     = 256;   // behind every tensor

static std::string    first_error;
static emulator_order order = EMULATOR_FORWARD;
static std::mt19937   rng(1);

static void set_error(const std::string & text) {
    if (first_error.empty()) {
        first_error = text;
    }
}

std::string emulator_take_error() {
    std::string res;
    res.swap(first_error);
    return res;
}

void emulator_set_order(emulator_order o) { order = o; }

float emulator_half_to_float(uint16_t bits) { return ggml_fp16_to_fp32(bits); }

template<typename T> static void reorder(T first, T last) {
    if (order == EMULATOR_BACKWARD) {
        std::reverse(first, last);
    } else if (order == EMULATOR_SHUFFLED) {
        std::shuffle(first, last, rng);
    }
}

//
// threads
//

enum collective { NONE, GROUP_BARRIER, SIMD_BARRIER, SIMD_SUM, SIMD_SUM_UINT, SIMD_MAX, SIMD_PREFIX, FINISHED };

namespace {

struct fiber {
    jmp_buf    place;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    emulator_thread thread;
    collective at = NONE; // where it waits
    union { float f; uint32_t u; } value;
};

struct machine {
    std::vector<fiber> fibers = std::vector<fiber>(MAX_THREADS);
    std::vector<int>   ready; // the last one runs next
    jmp_buf            host;
    int                n = 0, n_started = 0;
    int                n_barrier = 0, n_finished = 0;
    int                n_simd[MAX_THREADS/SIMD];
    fiber *            current = nullptr;
    emulator_kernel    kernel = nullptr;
    const emulator_bindings * bindings = nullptr;

    [[noreturn]] void run_next();
    void wait(collective what);
    void meet(int simdgroup, collective what);
    void release(int first, int count);
    bool run(emulator_kernel k, const emulator_bindings & b, const uint32_t group[3], int n_threads);
};

machine m;

void fiber_main() {
    for (;;) {
        m.kernel(*m.bindings, m.current->thread);
        m.current->at = FINISHED;
        ++m.n_finished;
        if (_setjmp(m.current->place) == 0) {
            m.run_next();
        }
    }
}

void machine::run_next() {
    if (ready.empty()) {
        current = nullptr;
        _longjmp(host, 1);
    }
    current = &fibers[ready.back()];
    ready.pop_back();
    if (!current->stack) {
        current->stack.reset(new char[STACK_SIZE]);
        getcontext(&current->start);
        current->start.uc_stack.ss_sp   = current->stack.get();
        current->start.uc_stack.ss_size = STACK_SIZE;
        current->start.uc_link          = nullptr;
        makecontext(&current->start, fiber_main, 0);
        setcontext(&current->start);
    }
    _longjmp(current->place, 1);
}

void machine::release(int first, int count) {
    const size_t old = ready.size();
    for (int i = count - 1; i >= 0; --i) {
        fibers[first + i].at = NONE;
        ready.push_back(first + i);
    }
    reorder(ready.begin() + old, ready.end());
}

// all lanes are here: what the function gives each of them
void machine::meet(int simdgroup, collective what) {
    fiber * lanes = &fibers[simdgroup*SIMD];
    for (int i = 0; i < SIMD; ++i) {
        if (lanes[i].at != what) {
            set_error("the lanes of a simdgroup are at different functions");
        }
    }
    if (what == SIMD_SUM || what == SIMD_MAX) {
        float x[SIMD];
        for (int i = 0; i < SIMD; ++i) {
            x[i] = lanes[i].value.f;
        }
        for (int s = SIMD/2; s > 0; s /= 2) { // as a butterfly does it
            for (int i = 0; i < s; ++i) {
                x[i] = what == SIMD_SUM ? x[i] + x[i + s] : std::max(x[i], x[i + s]);
            }
        }
        for (int i = 0; i < SIMD; ++i) {
            lanes[i].value.f = x[0];
        }
    } else if (what == SIMD_SUM_UINT || what == SIMD_PREFIX) {
        uint32_t total = 0;
        for (int i = 0; i < SIMD; ++i) {
            const uint32_t x = lanes[i].value.u;
            lanes[i].value.u = total;
            total += x;
        }
        for (int i = 0; what == SIMD_SUM_UINT && i < SIMD; ++i) {
            lanes[i].value.u = total;
        }
    }
}

void machine::wait(collective what) {
    fiber * self = current;
    self->at = what;
    if (what == GROUP_BARRIER) {
        if (++n_barrier == n) {
            n_barrier = 0;
            release(0, n);
        }
    } else {
        const int sg = self->thread.simdgroup;
        if (++n_simd[sg] == SIMD) {
            n_simd[sg] = 0;
            meet(sg, what);
            release(sg*SIMD, SIMD);
        }
    }
    if (_setjmp(self->place) == 0) {
        run_next();
    }
}

// false: some threads never got to the end
bool machine::run(emulator_kernel k, const emulator_bindings & b, const uint32_t group[3], int n_threads) {
    kernel     = k;
    bindings   = &b;
    n          = n_threads;
    n_barrier  = n_finished = 0;
    std::fill_n(n_simd, MAX_THREADS/SIMD, 0);
    for (int i = 0; i < n; ++i) {
        auto & t = fibers[i].thread;
        std::copy_n(group, 3, t.group);
        t.index     = i;
        t.lane      = i % SIMD;
        t.simdgroup = i / SIMD;
    }
    ready.clear();
    release(0, n);
    if (_setjmp(host) == 0) {
        run_next();
    }
    if (n_finished == n) {
        return true;
    }
    for (int i = 0; i < n; ++i) {
        fibers[i].stack.reset(); // those that hang there are given up
    }
    return false;
}

} // namespace

void emulator_threadgroup_barrier() { m.wait(GROUP_BARRIER); }
void emulator_simdgroup_barrier()   { m.wait(SIMD_BARRIER); }

static float simd_float(collective what, float x) {
    fiber * self = m.current;
    self->value.f = x;
    m.wait(what);
    return self->value.f;
}

static uint32_t simd_uint(collective what, uint32_t x) {
    fiber * self = m.current;
    self->value.u = x;
    m.wait(what);
    return self->value.u;
}

float    emulator_simd_sum(float x)                            { return simd_float(SIMD_SUM, x); }
float    emulator_simd_max(float x)                            { return simd_float(SIMD_MAX, x); }
uint32_t emulator_simd_sum_uint(uint32_t x)                    { return simd_uint(SIMD_SUM_UINT, x); }
uint32_t emulator_simd_prefix_exclusive_sum(uint32_t x)        { return simd_uint(SIMD_PREFIX, x); }

//
// what ggml-metal-device.h declares, as far as native/metal/rkv-metal.cpp calls it
//

struct ggml_metal_pipeline {
    std::string     name;
    emulator_kernel run;
};

struct ggml_metal_library {
    std::vector<std::unique_ptr<ggml_metal_pipeline>> pipelines;
};

struct dispatch {
    const ggml_metal_pipeline * pipeline = nullptr;
    emulator_bindings bindings = {};
    size_t shared = 0;
    uint32_t groups[3];
    int n_threads = 0;
};

// kernels are kept until a memory barrier: a device may run them side by side
struct ggml_metal_encoder {
    dispatch next;
    std::vector<dispatch> pending;
};

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    for (const auto & p : lib->pipelines) {
        if (p->name == name) {
            res.pipeline = p.get();
        }
    }
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name,
        ggml_metal_cv_t) {
    ggml_metal_pipeline_with_params res = {};
    if (emulator_kernel run = emulator_find_kernel(base)) {
        lib->pipelines.emplace_back(new ggml_metal_pipeline { name, run });
        res.pipeline = lib->pipelines.back().get();
    } else {
        set_error(std::string("no kernel ") + base);
    }
    return res;
}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->next = {};
    enc->next.pipeline = pipeline.pipeline;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    if (idx != 0 || size > sizeof(enc->next.bindings.args)) {
        set_error("arguments at a wrong index or too large");
        return;
    }
    memcpy(enc->next.bindings.args, data, size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    if (buffer.offs % 4 != 0) {
        set_error("a buffer's offset is no multiple of 4");
    }
    enc->next.bindings.buffers[idx] = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    if (idx != 0 || size % 16 != 0 || size > MAX_SHARED) {
        set_error("threadgroup memory of " + std::to_string(size) + " bytes at index " + std::to_string(idx));
    }
    enc->next.shared = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    dispatch & d = enc->next;
    d.n_threads = tptg0*tptg1*tptg2;
    if (!d.pipeline || d.n_threads % SIMD != 0 || d.n_threads > MAX_THREADS || tg0 < 1 || tg1 < 1 || tg2 < 1) {
        set_error("a dispatch of " + std::to_string(d.n_threads) + " threads");
        return;
    }
    d.groups[0] = tg0;
    d.groups[1] = tg1;
    d.groups[2] = tg2;
    enc->pending.push_back(d);
}

static void run_dispatch(dispatch & d) {
    // threadgroup memory begins as anything, and writing past it is noticed
    static std::vector<float> shared;
    const size_t n_shared = d.shared/sizeof(float), n_guard = GUARD_SIZE/sizeof(float);
    uint32_t guard;
    memset(&guard, 0xb7, sizeof(guard));

    const uint32_t n_groups = d.groups[0]*d.groups[1]*d.groups[2];
    std::vector<uint32_t> ids(n_groups);
    for (uint32_t i = 0; i < n_groups; ++i) {
        ids[i] = i;
    }
    reorder(ids.begin(), ids.end());
    for (const uint32_t id : ids) {
        shared.assign(n_shared + n_guard, NAN);
        memset(shared.data() + n_shared, 0xb7, GUARD_SIZE);
        d.bindings.shared = shared.data();
        const uint32_t group[3] = { id % d.groups[0], id/d.groups[0] % d.groups[1], id/d.groups[0]/d.groups[1] };
        if (!m.run(d.pipeline->run, d.bindings, group, d.n_threads)) {
            set_error(d.pipeline->name + ": some threads do not get to a barrier that others wait at");
            return;
        }
        for (size_t i = 0; i < n_guard; ++i) {
            if (memcmp(&shared[n_shared + i], &guard, sizeof(guard)) != 0) {
                set_error(d.pipeline->name + ": writes past its threadgroup memory");
            }
        }
    }
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) {
    reorder(enc->pending.begin(), enc->pending.end());
    for (auto & d : enc->pending) {
        if (first_error.empty()) {
            run_dispatch(d);
        }
    }
    enc->pending.clear();
}

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const ggml_tensor * t) {
    return { (void *) buf, (size_t) ((char *) t->data - (char *) buf) };
}

//
// the backend
//

static void buffer_free(ggml_backend_buffer_t buffer) { free(buffer->context); }
static void * buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }
static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) { memset((char *) t->data + offset, value, size); }
static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) { memcpy((char *) t->data + offset, data, size); }
static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) { memcpy(data, (const char *) t->data + offset, size); }
static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); }

static const char * device_name(ggml_backend_dev_t)         { return "MetalEmulated"; }
static const char * backend_name(ggml_backend_t)            { return "MetalEmulated"; }
static const char * buft_name(ggml_backend_buffer_type_t)   { return "MetalEmulated"; }
static size_t buft_alignment(ggml_backend_buffer_type_t)    { return 16; }

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_base;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor    = buffer_set;
    iface.get_tensor    = buffer_get;
    iface.clear         = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, malloc(size), size);
}

static size_t own_size(const ggml_tensor * t) {
    return ggml_nbytes(t) + (t->op == GGML_OP_RKV ? rkv_metal_extra_size(t) : 0);
}

static size_t buft_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) { return own_size(t) + GUARD_SIZE; }

static ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t);

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || (op->op == GGML_OP_RKV && rkv_metal_supports_op(op, true));
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == device_buft(dev); }

static ggml_backend_device * device() {
    static ggml_backend_device dev = [] {
        ggml_backend_device d = {};
        d.iface.get_name        = device_name;
        d.iface.get_buffer_type = device_buft;
        d.iface.supports_op     = device_supports_op;
        d.iface.supports_buft   = device_supports_buft;
        return d;
    }();
    return &dev;
}

static ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t) {
    static ggml_backend_buffer_type buft = [] {
        ggml_backend_buffer_type b = {};
        b.iface.get_name       = buft_name;
        b.iface.alloc_buffer   = buft_alloc;
        b.iface.get_alignment  = buft_alignment;
        b.iface.get_alloc_size = buft_alloc_size;
        b.device               = device();
        return b;
    }();
    return &buft;
}

static ggml_status backend_compute(ggml_backend_t, ggml_cgraph * gf) {
    std::vector<ggml_tensor *> owners;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        for (int s = -1; s < GGML_MAX_SRC; ++s) {
            ggml_tensor * t = s < 0 ? node : node->src[s];
            t = t && t->view_src ? t->view_src : t;
            if (t && std::find(owners.begin(), owners.end(), t) == owners.end()) {
                owners.push_back(t);
            }
        }
    }
    for (ggml_tensor * t : owners) {
        memset((char *) t->data + ggml_nbytes(t), 0xff, own_size(t) - ggml_nbytes(t)); // scratch begins as NaN
        memset((char *) t->data + own_size(t), 0xb7, GUARD_SIZE);
    }

    static ggml_metal_library lib;
    ggml_metal_encoder enc;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_RKV) {
            rkv_metal_encode(&lib, &enc, node);
            ggml_metal_encoder_memory_barrier(&enc);
        }
    }
    for (const ggml_tensor * t : owners) {
        const uint8_t * guard = (const uint8_t *) t->data + own_size(t);
        if (std::any_of(guard, guard + GUARD_SIZE, [](uint8_t x) { return x != 0xb7; })) {
            set_error(std::string("writing past ") + (t->op == GGML_OP_RKV ? "a result's scratch" : "an input"));
        }
    }
    return first_error.empty() ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static void backend_free(ggml_backend_t backend) { delete backend; }

ggml_backend_t emulator_backend_init() {
    auto backend = std::make_unique<ggml_backend>();
    backend->iface.get_name      = backend_name;
    backend->iface.free          = backend_free;
    backend->iface.graph_compute = backend_compute;
    backend->device              = device();
    return backend.release();
}
