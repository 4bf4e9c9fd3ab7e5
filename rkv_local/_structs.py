"""The structs and signatures of native/rkv.h for ctypes, in that header's order."""

from __future__ import annotations

import ctypes
from typing import Any

# The RKV_VERSION that these structs mirror.
RKV_VERSION = 5

float_p = ctypes.POINTER(ctypes.c_float)
int_p = ctypes.POINTER(ctypes.c_int32)
uint_p = ctypes.POINTER(ctypes.c_uint32)


class RkvParams(ctypes.Structure):
    """struct rkv_params. `lambda_` is its `lambda`, a Python keyword."""

    _fields_ = [
        ("policy", ctypes.c_int32),
        ("budget", ctypes.c_uint32),
        ("buffer", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("pin", ctypes.c_uint32),
        ("pool", ctypes.c_uint32),
        ("lambda_", ctypes.c_float),
        ("threshold", ctypes.c_float),
        ("n_sim", ctypes.c_uint32),
        ("memory", ctypes.c_float),
        ("chunk", ctypes.c_uint32),
        ("recent", ctypes.c_uint32),
        ("growth", ctypes.c_uint32),
        ("value_share", ctypes.c_float),
        ("value_weight", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("shared_heads", ctypes.c_bool),
        ("reference", ctypes.c_bool),
        ("n_batch_seq", ctypes.c_uint32),
        ("layer_budgets", uint_p),
        ("n_layer_budgets", ctypes.c_uint32),
    ]


class RkvStats(ctypes.Structure):
    """struct rkv_stats."""

    _fields_ = [
        ("active", ctypes.c_bool),
        ("cells", ctypes.c_uint32),
        ("bytes", ctypes.c_uint64),
        ("bytes_kv", ctypes.c_uint64),
        ("compactions", ctypes.c_uint64),
        ("t_compaction_us", ctypes.c_uint64),
        ("tokens_evicted", ctypes.c_uint64),
    ]


class RkvMemory(ctypes.Structure):
    """struct rkv_memory."""

    _fields_ = [
        ("device", ctypes.c_char * 64),
        ("buffer", ctypes.c_char * 64),
        ("host", ctypes.c_bool),
        ("weights", ctypes.c_uint64),
        ("cache", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
        ("pass_", ctypes.c_uint64),
    ]


class RkvLayer(ctypes.Structure):
    """struct rkv_layer."""

    _fields_ = [
        ("n_head", ctypes.c_int32),
        ("n_readers", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("n_embd_head_k", ctypes.c_int32),
        ("n_embd_head_v", ctypes.c_int32),
        ("n_rot", ctypes.c_int32),
        ("rope_begin", ctypes.c_int32),
        ("budget", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("has_sinks", ctypes.c_bool),
        ("v_in_k", ctypes.c_bool),
        ("unrotatable", ctypes.c_bool),
    ]


class RkvSelectArgs(ctypes.Structure):
    """struct rkv_select_args."""

    _fields_ = [
        ("params", RkvParams),
        ("layer", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("n_embd_head", ctypes.c_int32),
        ("n_old", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("type_k", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("k", float_p),
        ("q", float_p),
        ("pos", int_p),
        ("v", float_p),
        ("n_embd_head_v", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("aux", float_p),
        ("stats", float_p),
        ("rope_n_rot", ctypes.c_int32),
        ("rope_neox", ctypes.c_int32),
        ("rope_n_ctx_orig", ctypes.c_int32),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("rope_ext_factor", ctypes.c_float),
        ("rope_attn_factor", ctypes.c_float),
        ("rope_beta_fast", ctypes.c_float),
        ("rope_beta_slow", ctypes.c_float),
        ("rope_freq_factors", float_p),
    ]


def signatures(low: Any) -> dict[str, tuple[list[Any], Any]]:
    """Argument and result types of every rkv_* function; `low` is llama_cpp's ctypes module."""
    ctx, i32, size = low.llama_context_p_ctypes, ctypes.c_int32, ctypes.c_size_t
    params_p, args_p = ctypes.POINTER(RkvParams), ctypes.POINTER(RkvSelectArgs)
    cell = [ctx, i32, i32, i32]  # ctx, seq_id, layer, head
    return {
        "rkv_default_params": ([], RkvParams),
        "rkv_version": ([], i32),
        "rkv_build_info": ([], ctypes.c_char_p),
        "rkv_policy_name": ([i32], ctypes.c_char_p),
        "rkv_last_error": ([], ctypes.c_char_p),
        "rkv_params_check": ([params_p], ctypes.c_bool),
        "rkv_init_from_model": ([low.llama_model_p_ctypes, low.llama_context_params, params_p], ctx),
        "rkv_begin_init": ([params_p], None),
        "rkv_end_init": ([], ctypes.c_bool),
        "rkv_get_stats": ([ctx], RkvStats),
        "rkv_get_memory": ([ctx, ctypes.POINTER(RkvMemory), size], i32),
        "rkv_seq_used": ([ctx, i32], i32),
        "rkv_seq_room": ([ctx, i32], i32),
        "rkv_seq_compact": ([ctx, i32], ctypes.c_bool),
        "rkv_seq_pin": ([ctx, i32, ctypes.c_uint32], ctypes.c_bool),
        "rkv_seq_set_scores": ([*cell, float_p, size], ctypes.c_bool),
        "rkv_get_positions": ([*cell, int_p, size], i32),
        "rkv_get_keys": ([*cell, float_p, size], i32),
        "rkv_get_keys_unrotated": ([*cell, float_p, size], i32),
        "rkv_get_values": ([*cell, float_p, size], i32),
        "rkv_get_scores": ([*cell, i32, float_p, size], i32),
        "rkv_get_queries": ([ctx, i32, i32, float_p, size], i32),
        "rkv_get_attn_scale": ([ctx, i32], ctypes.c_float),
        "rkv_get_layer": ([ctx, i32, ctypes.POINTER(RkvLayer)], ctypes.c_bool),
        "rkv_select": ([args_p, int_p, float_p], i32),
        "rkv_unrotate": ([args_p, float_p], i32),
    }
