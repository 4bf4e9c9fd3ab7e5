"""--memory: the options of a command adapted to a limit, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rkv_local.cli import ui
from rkv_local.sizes import show

if TYPE_CHECKING:
    from rkv_local.bench import Plan as BenchPlan
    from rkv_local.cli.options import LoadOptions
    from rkv_local.memory import Planner
    from rkv_local.memory_plan import Plan
    from rkv_local.probe import Setting


def fitted(options: LoadOptions, values: dict[str, Any]) -> LoadOptions:
    """Options that fit in --memory; those that were given stay.

    Raises:
        click.ClickException: nothing fits, or more is asked for than the machine has.
    """
    from rkv_local import RKVError
    from rkv_local.memory import Planner

    setting = setting_of(options)
    try:
        with Planner(options.model.path, values["memory"]) as planner:
            check_limit(planner)
            plan = planner.search(setting, free_of(values))
    except (ValueError, RKVError) as err:
        if values["memory"] == "auto":
            return options  # loading it says the same, or shows that it is possible
        raise click.ClickException(f"--memory: {err}") from err
    if not plan.fits:
        raise click.ClickException(why_not(plan, values["memory"] == "auto"))
    if values["memory"] != "auto" or plan.reasons or options.verbose:
        say(plan)
    return adapted(options, plan.setting)


def fitted_bench(plan: BenchPlan, values: dict[str, Any]) -> BenchPlan:
    """A benchmark whose caches fit in --memory at once, by layers on the GPU and, for -np auto, sequences.

    Raises:
        click.ClickException: nothing fits, or more is asked for than the machine has.
    """
    from rkv_local import RKVError
    from rkv_local._native import max_sequences
    from rkv_local.memory import Planner, largest

    auto = values["memory"] == "auto" and values["parallel"] is not None
    try:
        with Planner(plan.model, values["memory"]) as planner:
            check_limit(planner)
            planner.for_gpus = plan.gpu_layers != 0

            def made(plan: BenchPlan) -> Plan:
                return planner.together(plan.settings())

            chosen = plan
            if values["gpu_layers"] is None and planner.gpus and not made(chosen).fits:
                n_layer = planner.shape.n_layer
                layers = largest(lambda n: n == 0 or made(replace(plan, gpu_layers=n)).fits, 0, n_layer)
                chosen = replace(plan, gpu_layers=layers)
            if values["parallel"] is None:
                n_seq = largest(
                    lambda n: n == 1 or made(replace(chosen, parallel=n)).fits, 1, max_sequences()
                )
                chosen = replace(chosen, parallel=n_seq)
            result = made(chosen)
    except (ValueError, RKVError) as err:
        if auto:
            return plan  # loading it says the same, or shows that it is possible
        raise click.ClickException(f"--memory: {err}") from err
    if not result.fits:
        raise click.ClickException(
            f"{show(result.lacking_bytes)} too much for {ui.plural(len(chosen.arms()), 'cache')} at once "
            f"(2 % stay in reserve): {result.line()}; a smaller --depth or -np, q8_0 caches, or one setting "
            f"of -fa takes less"
        )
    if not auto or chosen != plan:
        ui.note(result.line())
        if chosen.parallel != plan.parallel:
            ui.note(f"{ui.plural(chosen.parallel, 'sequence')} fit")
        if chosen.gpu_layers != plan.gpu_layers:
            ui.note(f"so that it fits: {chosen.gpu_layers} of {result.n_layer + 1} layers on the GPU")
    return chosen


def setting_of(options: LoadOptions) -> Setting:
    """What a Session is made with (cli/session.py)."""
    from rkv_local.probe import Setting

    return Setting(
        kv=options.kv,
        n_ctx=options.ctx_size,
        n_batch=options.batch_size,
        type_k=options.cache_type_k,
        type_v=options.cache_type_v,
        flash_attn=options.flash_attn,
        n_gpu_layers=options.gpu_layers,
        offload_kqv=options.kv_offload,
        use_mmap=options.mmap,
        n_threads=options.threads,
        n_threads_batch=options.threads,
    )


def adapted(options: LoadOptions, setting: Setting) -> LoadOptions:
    """The options with what a plan decided."""
    return replace(
        options,
        kv=setting.kv,
        ctx_size=options.ctx_size if setting.n_ctx is None else setting.n_ctx,
        batch_size=setting.n_batch,
        gpu_layers=setting.n_gpu_layers,
        mmap=setting.use_mmap,
        cache_type_k=setting.type_k,
        cache_type_v=setting.type_v,
        flash_attn=setting.flash_attn,
    )


def free_of(values: dict[str, Any]) -> frozenset[str]:
    """What the planner may decide: what no option decides already."""
    from rkv_local.memory import FREE

    fixed = set()
    if values["gpu_layers"] is not None:
        fixed.add("n_gpu_layers")
    if values.get("batch_size") is not None:
        fixed.add("n_batch")
    if values.get("ctx_size") is not None:
        fixed.add("n_ctx")
    if given("kv_buffer"):
        fixed.add("kv_buffer")
    if given("kv_budget") or given("kv_layer_budgets"):
        fixed.add("kv_budget")
    if given("cache_type_k") or given("cache_type_v"):
        fixed.add("cache_type")
    if values.get("flash_attn", "auto") != "auto":
        fixed.add("flash_attn")
    return FREE - fixed


def given(name: str) -> bool:
    """Whether an option of the current command was given."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def check_limit(planner: Planner) -> None:
    """Refuse more than the machine has; a word on more than is free."""
    if planner.explicit is None:
        return
    where = "GPU" if planner.gpus else "machine"
    if planner.explicit > planner.total:
        raise click.ClickException(
            f"--memory {show(planner.explicit)} is more than the {show(planner.total)} of this {where}"
        )
    if planner.explicit > planner.available:
        ui.note(f"--memory {show(planner.explicit)}, but {show(planner.available)} are free now")


def say(plan: Plan) -> None:
    """What was chosen and why, on stderr."""
    ui.note(plan.line())
    if plan.reasons:
        ui.note(f"so that it fits: {'; '.join(plan.reasons)}")


def why_not(plan: Plan, auto: bool) -> str:
    """The line for the user where nothing fits."""
    hint = ["--memory SIZE sets another limit than what is free now"] if auto else []
    return "; ".join([*plan.reasons, *hint])
