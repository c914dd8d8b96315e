"""A plan is printed for people, and returned as JSON values for programs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from jaxlm.core import config
from jaxlm.planning import ahead_of_time, mesh_search, plan, roofline, targets, workers
from jaxlm.planning.ahead_of_time import Compiled
from jaxlm.planning.plan import bottleneck, fits
from jaxlm.planning.roofline import Cost
from jaxlm.planning.targets import Target
from jaxlm.planning.workers import Exchange

console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 140)
OVERLAP = (
    "Products, and what kernels between them read and write, follow one another; weights and gradients move beside "
    "them; sums of activations are waited for where it says so."
)


def plan_one(run: config.Run, t: Target, compiling: bool, link: float | None = None) -> tuple[dict[str, Any], bool]:
    """Plans a run on a target and prints it; returns (figures, whether it fits). The change that helps most is found by
    arithmetic either way. `link`: as `plan.make` takes it."""
    made = plan.make(run, t, compiling, link)
    show(made.cost, t, made.mesh, made.notes, made.compiled)
    if made.exchange:
        show_exchange(made, made.exchange)
    if made.host_bytes is None:
        console.print("kept rows    in a host's memory, as many as the data has")
    elif made.host_bytes:
        console.print(f"kept rows    up to {amount(made.host_bytes)} of a host's memory")
    if made.refused:
        console.print(f"[bold red]refused[/]      {made.refused}")
    advise(workers.worker_run(run), t, made.by_arithmetic)
    values = record(made.cost, t, made.mesh, made.compiled) | {"host_memory_bytes": made.host_bytes}
    if made.exchange:
        values["exchange"] = record_exchange(made, made.exchange)
    if made.refused:
        values |= {"fits": False, "refused": made.refused}
    return values, made.fits is not False


def advise(run: config.Run, t: Target, cost: Cost) -> None:
    if change := mesh_search.best_change(run, t, cost):
        console.print(f"to try first {change}")


def search(run: config.Run, t: Target, compiling: int, out: Path | None) -> tuple[dict[str, Any], bool]:
    """Searches for a mesh and prints the ranking; returns (figures of those ranked first, whether the best fits)."""
    mesh_search.check_free(out)
    run = workers.worker_run(run)
    every = mesh_search.candidates(run, t)
    shown = every[: max(8, compiling)]
    console.print(f"[bold]{t.name}[/]: {len(every):,} layouts divide this model and batch; the first by arithmetic:")
    table = rich.table.Table("", "layout", "memory", "a step", "tokens/s a device", "MFU", "most goes to")
    for n, c in enumerate(shown, 1):
        table.add_row(str(n), c.changes, _room(c.cost, t), *_speed(c.cost, t))
    console.print(table)
    best, rows = shown[0], [_row(c, t) for c in shown]
    if compiling:
        best, rows = _compiled(shown[:compiling], t, rows)
    ok = not t.chip.hbm or fits(best.cost, t)
    if out:
        mesh_search.write(best.run, out, f"{run.name} on {t.name}, as jaxlm plan --search chose it: {best.changes}.")
        console.print(f"best         {out}: {best.changes}")
    return {"target": t.name, "layouts": len(every), "ranked": rows, "best": best.changes}, ok


def _compiled(
    shown: list[mesh_search.Candidate], t: Target, rows: list[dict[str, Any]]
) -> tuple[mesh_search.Candidate, list[dict[str, Any]]]:
    table = rich.table.Table("compiled", "memory", "a step", "tokens/s a device", "MFU", "most goes to")
    done = []
    for n, c in enumerate(shown):
        try:
            made = ahead_of_time.compile_step(c.run, t)
        except ahead_of_time.Refused as refusal:
            table.add_row(c.changes, "[red]refused[/]", "", "", "", str(refusal)[:80])
            rows[n]["refused"] = str(refusal)
            continue
        done.append(mesh_search.Candidate(c.run, made.cost))
        table.add_row(c.changes, _room(made.cost, t), *_speed(made.cost, t))
        rows[n]["compiled"] = record(made.cost, t, made.sizes, made)
    console.print(table)
    return (min(done, key=lambda c: mesh_search.rank(c, t)) if done else shown[0]), rows


def _room(c: Cost, t: Target) -> str:
    return amount(c.peak) if not t.chip.hbm or fits(c, t) else f"[red]{amount(c.peak)}, too much[/]"


def _speed(c: Cost, t: Target) -> list[str]:
    if not c.times:
        return ["", "", "", ""]
    s = c.speed(t.count, t.chip.flops)
    return [seconds(c.times["step"]), f"{s['tokens_per_s_device']:,.0f}", f"{s['mfu_causal']:.1%}", bottleneck(c)]


def _row(c: mesh_search.Candidate, t: Target) -> dict[str, Any]:
    return {"layout": c.changes, "memory_bytes": c.cost.peak, "seconds": c.cost.times.get("step")}


def measured(run: config.Run, limit: int, steps: int, out: Path | None) -> dict[str, Any]:
    mesh_search.check_free(out)
    t = targets.here()
    found = mesh_search.tune(run, t, limit, steps, console.print)
    table = rich.table.Table("measured here", "a step", "tokens/s a device")
    for c, s in found:
        speed = "" if s is None else f"{c.cost.tokens / s / t.count:,.0f}"
        table.add_row(c.changes, "refused" if s is None else seconds(s), speed)
    console.print(table)
    best, taken = found[0]
    if taken is None:
        raise ValueError("tune: none of these fits this machine; lower train.batch_size or raise train.micro_batches")
    if out:
        mesh_search.write(best.run, out, f"{run.name} as jaxlm tune measured it fastest: {best.changes}.")
        console.print(f"best         {out}: {best.changes}")
    return {"best": best.changes, "measured": [{"layout": c.changes, "seconds": s} for c, s in found]}


def amount(number: float, unit: str = "B") -> str:
    for limit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {name}{unit}"
    return f"{number:.3g} {unit}"


def seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms"


def show(c: Cost, t: Target, sizes: Mapping[str, int], notes: Mapping[str, str], compiled: Compiled | None) -> None:
    how = f"compiled in {compiled.seconds:.0f} s" if compiled else "by arithmetic, not compiled"
    console.print(f"[bold]{t.name}[/]: {t.count} × {t.chip.kind}, {how}")
    for name in ("mesh", "attention", "layers", "precision"):
        if name in notes:  # a module that attends by itself says nothing of it
            console.print(f"{name:12} {notes[name]}")
    show_memory(c, t)
    show_times(c, t, sizes)
    if compiled:
        show_collectives(compiled)
        show_buffers(compiled)
        for warning in compiled.warnings:
            console.print(f"[bold red]partitioner[/] {warning.strip()}")
    if c.times:
        speed = c.speed(t.count, t.chip.flops)
        console.print(
            f"[bold]predicted[/]    {seconds(c.times['step'])} a step of {c.tokens:,} tokens, "
            f"{speed['tokens_per_s_device']:,.0f} tokens/s a device, {speed['tokens_per_s']:,.0f} in all, "
            f"MFU {speed['mfu_causal']:.1%} (causal pairs) or {speed['mfu_full']:.1%} (all pairs)"
        )
        console.print(f"bottleneck   {bottleneck(c)}")
    else:
        console.print(f"predicted    no times: the table of chips has no peak for {t.chip.kind}")


def show_memory(c: Cost, t: Target) -> None:
    table = rich.table.Table("memory of a device", "bytes", title="", show_footer=True)
    table.columns[0].footer, table.columns[1].footer = "together", amount(c.peak)
    for part, number in c.memory.items():
        table.add_row(part, amount(number))
    console.print(table)
    for part, number in c.host.items():
        console.print(f"host         {amount(number)} of {part} in the host's memory, for each device")
    if t.chip.hbm:
        ok = fits(c, t)
        mark = "[green]fits[/]" if ok else "[bold red]does not fit[/]"
        console.print(f"memory       {mark}: {amount(c.peak)} of {amount(t.chip.hbm)}, of which "
                      f"{ahead_of_time.RESERVE:.0%} are left to the runtime")  # fmt: skip


def show_times(c: Cost, t: Target, sizes: Mapping[str, int]) -> None:
    if not c.times:
        console.print(f"work         {amount(c.flops, 'FLOP')} and {amount(c.hbm)} of memory traffic a device and step")
        return
    table = rich.table.Table("a step, one device", "amount", "rate", "time")
    flops = t.chip.flops * t.chip.efficiency
    table.add_row("compute", amount(c.flops, "FLOP"), f"{amount(flops, 'FLOP/s')} ({t.chip.efficiency:.0%} of peak)",
                  seconds(c.times["compute"]))  # fmt: skip
    table.add_row("memory between products", amount(c.times["memory"] * t.chip.hbm_bandwidth),
                  f"{amount(t.chip.hbm_bandwidth)}/s", seconds(c.times["memory"]))  # fmt: skip
    for f in sorted(c.flows, key=lambda f: -f.sent):
        network, speed = roofline.link(t, f, sizes)
        over = "" if f.kind == roofline.HOST else f" over {'+'.join(f.axes) or '?'}"
        rate = (f"{amount(speed)}/s" if speed else "not known") + ("" if f.hidden else ", waited for")
        table.add_row(f"{network}: {f.kind}{over}{f' of {f.what}' if f.what else ''}", amount(f.sent), rate,
                      seconds(f.sent / speed) if speed else "")  # fmt: skip
    if c.kernels:
        table.add_row("gaps between kernels", f"{c.kernels:,.0f}", f"{1e6 * roofline.LAUNCH:g} µs each",
                      seconds(c.times["launches"]))  # fmt: skip
    if c.bubble:
        table.add_row("pipeline's bubble", f"{c.bubble:.0%}", "", seconds(c.times["bubble"]))
    console.print(table)
    console.print(f"[dim]{OVERLAP}[/]")


def show_collectives(compiled: Compiled) -> None:
    table = rich.table.Table("collective", "over", "times", "bytes each", "bytes a step", "from")
    groups: dict[tuple, list] = {}
    for x in compiled.module.collectives:
        groups.setdefault((x.kind, x.axes), []).append(x)
    for (kind, axes), each in sorted(groups.items(), key=lambda g: -sum(x.sent for x in g[1])):
        whole, times = sum(x.bytes * x.times for x in each), sum(x.times for x in each)
        first = max(each, key=lambda x: x.bytes * x.times)
        table.add_row(kind, "+".join(axes) or "?", str(times), amount(whole / times), amount(whole), first.where)
    console.print(table)


def show_buffers(compiled: Compiled) -> None:
    table = rich.table.Table("largest arrays", "shape", "made by", "from")
    for b in compiled.module.buffers():
        table.add_row(amount(b.bytes), b.shape, b.opcode, b.where)
    console.print(table)
    if compiled.module.estimated_cycles:
        console.print(f"cycles       {compiled.module.estimated_cycles:,} of all kernels, by the TPU's compiler")


def show_exchange(made: plan.Plan, e: Exchange) -> None:
    """Prints what workers that train apart send each other or a server, and how long they wait for it."""
    whom = "the server" if e.server_bytes else "the others"
    parts = f", at most {amount(e.largest)} at a time" if e.parts > 1 else ""
    line = f"exchange     every {e.every} steps each of {e.workers} workers sends {amount(e.sent_by_worker)}{parts}"
    if e.server_bytes:
        line += f" to the server, and gets {amount(e.received_by_worker)}"
    if e.seconds is None:
        line += "; no time: the link isn't known, give it by --link"
    else:
        line += f"; {seconds(e.seconds)} with {amount(e.link)}/s to {whom}"
    console.print(line, soft_wrap=True)
    share = None if made.seconds is None else e.share(made.seconds)
    if share is not None and made.seconds is not None:
        waited = e.waited(made.seconds)
        assert waited is not None
        console.print(
            f"waiting      {seconds(waited)} of a round's {seconds(e.every * made.seconds + waited)} ({share:.1%})"
        )
    if e.server_bytes:
        console.print(f"server       {amount(e.server_bytes)} of its memory; in a round it gets "
                      f"{amount(e.workers * e.sent_by_worker)} and sends {amount(e.server_sent)}")  # fmt: skip
    if found := made.compiled_exchange:
        console.print(f"compiled     the exchange sends {amount(found.sent)} a device, by arithmetic {amount(e.sent)}, "
                      f"and needs {amount(found.temporaries)} beside the state")  # fmt: skip


def record_exchange(made: plan.Plan, e: Exchange) -> dict[str, Any]:
    """Returns what workers exchange as JSON's own types."""
    known, compiled = made.seconds, made.compiled_exchange
    return {
        "workers": e.workers, "every": e.every, "parts": e.parts, "bytes_sent_device": e.sent,
        "bytes_sent_worker": e.sent_by_worker, "bytes_received_worker": e.received_by_worker,
        "bytes_largest": e.largest, "link_bytes_per_s": e.link or None, "seconds": e.seconds,
        "seconds_waited": None if known is None else e.waited(known),
        "share_waited": None if known is None else e.share(known),
        "server_memory_bytes": e.server_bytes or None, "server_bytes_sent": e.server_sent or None,
        "compiled_bytes_sent_device": compiled.sent if compiled else None,
        "compiled_temporary_bytes": compiled.temporaries if compiled else None,
    }  # fmt: skip


def record(c: Cost, t: Target, sizes: Mapping[str, int], compiled: Compiled | None) -> dict[str, Any]:
    """Returns a plan as JSON's own types."""
    out: dict[str, Any] = {
        "target": t.name, "devices": t.count, "device_kind": t.chip.kind, "mesh": dict(sizes),
        "memory_bytes": c.memory | {"total": c.peak}, "device_bytes": t.chip.hbm or None,
        "fits": fits(c, t) if t.chip.hbm else None, "flops": c.flops, "memory_traffic_bytes": c.hbm,
        "tokens": c.tokens, "model_flops_per_token": c.model_flops, "seconds": c.times,
        "collectives": [{"kind": f.kind, "axes": list(f.axes), "what": f.what, "bytes_sent": f.sent,
                         "hidden": f.hidden} for f in c.flows if f.kind != roofline.HOST],
        "host_bytes": c.host, "kernels": c.kernels or None,
        "host_copies": [{"what": f.what, "bytes": f.sent, "hidden": f.hidden} for f in c.flows
                        if f.kind == roofline.HOST],
    }  # fmt: skip
    if c.times:
        out |= c.speed(t.count, t.chip.flops) | {"bottleneck": bottleneck(c)}
    if compiled:
        out |= {
            "compile_seconds": compiled.seconds, "estimated_cycles": compiled.module.estimated_cycles or None,
            "warnings": list(compiled.warnings),
            "largest_arrays": [vars(b) for b in compiled.module.buffers()],
        }  # fmt: skip
    return out
