"""The options that commands share, named as in llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from rkv_local.budget import CALIBRATED, POLICIES, SCHEDULES
from rkv_local.cli.options import DEFAULT_CTX_FULL
from rkv_local.options import DEFAULT_N_CTX, MAX_THREADS
from rkv_local.shape import CACHE_TYPES
from rkv_local.sizes import parse_size

_USUAL_MAX_SEQ = 256  # below it no library has to be loaded to tell

Decorator = Callable[[Any], Any]


class PolicyParam(click.ParamType):
    """A policy's name, or `list`."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if there is such a policy."""
        if value not in (*POLICIES, "list"):
            self.fail(f"{value!r} is not one of {', '.join(POLICIES)}, list", param, ctx)
        return str(value)


def list_policies(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """--kv-policy list: one line each, then leave."""
    if value == "list" and not ctx.resilient_parsing:
        width = max(map(len, POLICIES))
        for name, text in POLICIES.items():
            click.echo(f"{name:<{width}}  {text}")
        ctx.exit()
    return value


class LayerBudgets(click.ParamType):
    """A named schedule, a calibration, or one number per layer."""

    name = "schedule|file|n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """'uniform', 'pyramid', 'calibrated', the name of a .json file, or a tuple of ints."""
        if not isinstance(value, str) or value in (*SCHEDULES, CALIBRATED) or value.endswith(".json"):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r} is neither {', '.join((*SCHEDULES, CALIBRATED))}, a .json file nor numbers with "
                "commas between them",
                param,
                ctx,
            )


class Pin(click.ParamType):
    """A number of tokens, or the prompt."""

    name = "n|prompt"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or 'prompt'."""
        return "prompt" if value == "prompt" else int(click.IntRange(min=0).convert(value, param, ctx))


class GpuLayers(click.ParamType):
    """llama.cpp's -ngl: a number, all or auto."""

    name = "n|all|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number of layers, -1 for all, None for auto."""
        if value == "auto":
            return None
        if value == "all":
            return -1
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -2
        if number < -1:
            self.fail(f"{value!r} is not a number of layers, 'all', 'auto' or -1", param, ctx)
        return number


class Sequences(click.ParamType):
    """A number of sequences, up to what the libraries were built for."""

    name = "n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number."""
        n: int = click.IntRange(1).convert(value, param, ctx)
        if n > _USUAL_MAX_SEQ:
            from rkv_local._native import max_sequences

            n = click.IntRange(1, max_sequences()).convert(value, param, ctx)
        return n


class Parallel(Sequences):
    """A number of sequences, or auto."""

    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number; None for auto."""
        return None if value == "auto" else super().convert(value, param, ctx)


class Memory(click.ParamType):
    """A size in bytes, or auto."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Bytes, or 'auto'."""
        try:
            size = parse_size(value, "--memory")
        except ValueError as err:
            raise click.UsageError(str(err), ctx) from err
        return "auto" if size is None else size


class FiniteRange(click.FloatRange):
    """FloatRange without nan and inf, which compare as inside it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return float(number)


AT_LEAST_0, AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)
THREADS = click.IntRange(1, MAX_THREADS)
SHARE = FiniteRange(0, 1)


def opt(
    names: str, help: str, type: Any = None, default: Any = None, metavar: str | None = "N", **more: Any
) -> Decorator:
    """click.option in one line: names with spaces between them; a default is shown."""
    declared = names.split()
    return click.option(
        *declared,
        type=type,
        default=default,
        metavar=metavar,
        help=help,
        show_default=default is not None,
        **more,
    )


def stack(*options: Decorator) -> Decorator:
    """One decorator from several, shown in --help in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def model_option() -> Decorator:
    """The model by option."""
    return opt("-m --model", "A GGUF file or a short name (reasoner, smollm2).", metavar="MODEL")


def cache_options(*without: str) -> Decorator:
    """The budget of the cache, but for options of these names."""
    policies = f"What is kept: {', '.join(POLICIES)}; `list` explains them."
    options = {
        "kv_policy": opt(
            "--kv-policy", policies, PolicyParam(), "latest", "POLICY", callback=list_policies, is_eager=True
        ),
        "kv_budget": opt("--kv-budget", "Cells that a sequence keeps after a compaction.", AT_LEAST_1, 1024),
        "kv_buffer": opt(
            "--kv-buffer", "Tokens between two compactions (default: 128; latest: 256).", AT_LEAST_1
        ),
        "kv_pin": opt(
            "--kv-pin",
            "First tokens that are never evicted; prompt: the first prompt (default: 4; rpc: prompt).",
            Pin(),
            metavar="N|prompt",
        ),
        "kv_window": opt(
            "--kv-window",
            "Last tokens, always kept, whose queries judge importance (default: 8; rpc: 32).",
            AT_LEAST_1,
        ),
        "kv_recent": opt(
            "--kv-recent",
            "Last tokens kept whatever their score, at most half of a layer's budget (default: the window; "
            "latest: 96).",
            AT_LEAST_1,
        ),
        "kv_lambda": opt(
            "--kv-lambda",
            "Weight of importance against redundancy (default: 0.1; gkv: 0.5).",
            SHARE,
            metavar="X",
        ),
        "kv_value_weight": opt(
            "--kv-value-weight",
            "latest: weight of how far a token's value is from the mean value, beside the score of its key "
            "(default: 0.5; 0: none).",
            SHARE,
            metavar="X",
        ),
        "kv_seed": opt("--kv-seed", "Of what value-aware samples.", click.IntRange(0, 2**32 - 1), 0),
        "kv_layer_budgets": opt(
            "--kv-layer-budgets",
            "uniform, pyramid, calibrated (by `rkv-local calibrate`), a calibration's FILE.json, or N,N,...: "
            "one per layer (default: uniform; latest: calibrated where there is a calibration).",
            LayerBudgets(),
            None,
            "BUDGETS",
        ),
    }
    return stack(*(option for name, option in options.items() if name not in without))


def context_options(*flash_attn: Decorator) -> Decorator:
    """Threads, devices, cache types, log. flash_attn: another option in place of the usual one."""
    auto = "auto: off on the CPU, where that is faster, unless V is quantised; else llama.cpp's choice."
    usual = opt("-fa --flash-attn", auto, click.Choice(("on", "off", "auto")), "auto", None)
    cache_type, types = click.Choice(CACHE_TYPES), ", ".join(CACHE_TYPES)
    return stack(
        opt("-t --threads", "CPU threads (default: the physical cores).", THREADS),
        opt(
            "-ngl --gpu-layers --n-gpu-layers",
            "Layers on the GPU, where there is one; auto: as many as fit.",
            GpuLayers(),
            "auto",
            "N|all|auto",
        ),
        click.option(
            "-nkvo",
            "--no-kv-offload",
            is_flag=True,
            help="Keep the cache in main memory, also of layers on the GPU.",
        ),
        opt("-ctk --cache-type-k", f"Type of the cached keys: {types}.", cache_type, "f16", "TYPE"),
        opt(
            "-ctv --cache-type-v",
            "Type of the cached values; quantised: with -fa.",
            cache_type,
            "f16",
            "TYPE",
        ),
        *(flash_attn or (usual,)),
        click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr."),
    )


def memory_option() -> Decorator:
    """The limit that a plan keeps."""
    text = (
        "Memory to stay within, e.g. 6GiB: of the GPU, else of the process. auto: what is free, less 1 GiB "
        "or a tenth. Options that are not given adapt to it."
    )
    return opt("--memory", text, Memory(), "auto", "SIZE|auto")


def load_options() -> Decorator:
    """Everything that a model is loaded with."""
    reach = (
        f"How far the context may reach; it does not size the cache (default: {DEFAULT_N_CTX}; with policy "
        f"none, where it does, {DEFAULT_CTX_FULL}; the reasoner's: 4096; 0 = as the model was trained)."
    )
    batch = "Most tokens in one decode (default: the larger of the buffer and 256; with policy none 512)."
    return stack(
        opt("-c --ctx-size", reach, AT_LEAST_0),
        opt("-b --batch-size", batch, AT_LEAST_1),
        memory_option(),
        cache_options(),
        context_options(),
    )


def sampling_options() -> Decorator:
    """llama.cpp's samplers and their defaults there."""
    above_0 = FiniteRange(min=0, min_open=True)
    return stack(
        opt("--temp --temperature", "0 = always the likeliest token.", FiniteRange(min=0), 0.8, "X"),
        opt("--top-k", "0 = off.", AT_LEAST_0, 40),
        opt("--top-p", "1 = off.", SHARE, 0.95, "X"),
        opt("--min-p", "0 = off.", SHARE, 0.05, "X"),
        opt("--repeat-penalty", "1 = off.", above_0, 1.0, "X"),
        opt("-s --seed", "-1 = a new one each time.", click.IntRange(-1, 2**32 - 1), -1),
    )


def length_option() -> Decorator:
    """How long an answer may get."""
    text = "Most tokens in an answer; -1 = until the model stops."
    return opt("-n --max-tokens --predict --n-predict", text, int, -1)
