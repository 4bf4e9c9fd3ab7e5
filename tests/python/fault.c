// LD_PRELOAD: the n-th call that libllama makes of one ggml function fails, as where a device or memory does.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

static const char * armed = "";
static int left = 0;

void rkv_fault_arm(const char * name, int nth) { // until it struck; "" disarms
    armed = name;
    left  = nth;
}

int rkv_fault_left(void) { return left; } // 0: it struck

static bool strikes(const char * name) { return left > 0 && strcmp(armed, name) == 0 && --left == 0; }

// llama_cpp loads the libraries for itself alone: RTLD_NEXT does not find them
static void * real(const char * library, const char * name) { return dlsym(dlopen(library, RTLD_NOW | RTLD_NOLOAD), name); }

bool ggml_backend_sched_alloc_graph(void * sched, void * graph) {
    bool (*f)(void *, void *) = real("libggml-base.so", "ggml_backend_sched_alloc_graph");
    return !strikes("alloc") && f(sched, graph);
}

void * ggml_backend_init_by_type(int type, const char * params) {
    void * (*f)(int, const char *) = real("libggml.so", "ggml_backend_init_by_type");
    return strikes("backend") ? NULL : f(type, params);
}

int ggml_backend_sched_graph_compute_async(void * sched, void * graph) {
    int (*f)(void *, void *) = real("libggml-base.so", "ggml_backend_sched_graph_compute_async");
    if (strikes("compute")) {
        return -1; // GGML_STATUS_FAILED, nothing done
    }
    const int status = f(sched, graph);
    return strikes("late") ? -1 : status; // all done, and then it fails
}

int ggml_backend_sched_graph_compute(void * sched, void * graph) { // the generic path's
    int (*f)(void *, void *) = real("libggml-base.so", "ggml_backend_sched_graph_compute");
    if (strikes("compute")) {
        return -1;
    }
    const int status = f(sched, graph);
    return strikes("late") ? -1 : status;
}
