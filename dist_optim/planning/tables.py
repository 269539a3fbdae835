"""Plans as text, for a terminal and for pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dist_optim.planning.forecast import Forecast, Share

__all__ = ["HEADER", "gib", "print_plan", "print_table", "row"]

HEADER = ("weights", "grads", "masters", "state", "peak", "left", "sent GB", "step")
"""GiB on the fullest GPU; GB a step; time of the optimizer's step, or of all where a batch is given."""
HOST_TOO = "what is offloaded is in no column: plan --strategy fsdp2_offload says what the host must hold"
ESTIMATES = ("engine buffers", "scratch", "activations")


def gib(nbytes: float) -> str:
    """GiB in three digits."""
    value = nbytes / (1 << 30)
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    """A time in a unit that suits it."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def row(one: Forecast) -> list[str]:
    """The cells under ``HEADER``."""
    sizes = [one.memory[part].max for part in ("weights", "gradients", "masters", "optimizer state")]
    seconds = one.optimizer_s if one.step_s is None else one.step_s
    return [
        *map(gib, [*sizes, one.peak.max, one.headroom]),
        f"{sum(one.wire.values()) / 1e9:.1f}",
        milliseconds(seconds),
    ]


def print_table(console: Console, found: Sequence[Forecast], labels: Sequence[str], refused: Mapping[str, str]) -> None:
    """A line a plan, and below them what is refused, and why."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("GiB of the fullest", style="bold", no_wrap=True)
    for title in HEADER:
        table.add_column(title, justify="right", no_wrap=True)
    for one, label in zip(found, labels, strict=True):
        table.add_row(label, *row(one), style=None if one.fits else "red")
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for pair, why in refused.items():
        name = pair.partition(",")[0]
        reasons.setdefault(why.removeprefix(f"{name}: ").partition(". ")[0], []).append(pair)
    for why, pairs in reasons.items():
        console.print(f"refused: {'; '.join(pairs)}: {why}.", style="dim")
    notes = dict.fromkeys(note for one in found for note in one.notes)
    if any(one.host for one in found):
        console.print(f"note: {HOST_TOO}", style="dim")
    for note in notes:
        console.print(f"note: {note}", style="dim")


def print_plan(console: Console, one: Forecast) -> None:
    """All of one plan."""
    ranks = f"{one.num_ranks:,} GPU{'s' * (one.num_ranks > 1)} on {one.num_nodes:,} node{'s' * (one.num_nodes > 1)}"
    title = f"{one.model} ({one.numel / 1e9:.3g} billion parameters), {one.optimizer}, {one.strategy}, {ranks}"
    console.print(f"{title}, {one.precision}", style="bold")
    on_gpu = {part: share for part, share in one.memory.items() if part not in one.host}
    _print_parts(console, "GiB of a GPU", on_gpu, peak=one.peak)
    if one.host:
        _print_parts(console, "GiB of the host, a rank", one.host)
    _print_facts(console, one)
    for note in one.notes:
        console.print(f"note: {note}", style="dim")
    usable = f"{gib(one.gpu_bytes)} GiB (nine tenths of the GPU)"
    verdict = (
        Text(f"Fits: {gib(one.headroom)} GiB are left of {usable}.", style="bold green")
        if one.fits
        else Text(f"Does not fit: {gib(-one.headroom)} GiB more than {usable}. What does: --fit", style="bold red")
    )
    console.print(verdict)


def _print_parts(console: Console, title: str, parts: Mapping[str, Share], peak: Share | None = None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(title)
    table.add_column("fullest", justify="right")
    table.add_column("mean", justify="right")
    for part, share in parts.items():
        table.add_row(f"{part}{' (estimate)' if part in ESTIMATES else ''}", gib(share.max), gib(share.mean))
    if peak is not None:
        table.add_row("peak", gib(peak.max), gib(peak.mean), style="bold")
    console.print(Padding(table, (0, 0, 1, 2), expand=False))


def _print_facts(console: Console, one: Forecast) -> None:
    facts = [(f"sent, {phase}", f"{nbytes / 1e9:.2f} GB a step") for phase, nbytes in one.wire.items()]
    if one.num_rounds:
        facts.append(("fullest owner", f"{one.owned_imbalance:.1f} times the mean, {one.num_rounds} rounds a step"))
    facts.append(("optimizer's step (estimate)", milliseconds(one.optimizer_s)))
    if one.refresh_s:
        facts.append(("of it refreshes, shared out", milliseconds(one.refresh_s)))
    if one.step_s is not None:
        facts.append(("training step (estimate)", milliseconds(one.step_s)))
    facts.append(("checkpoint, all ranks", f"{gib(one.checkpoint_bytes)} GiB"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    for label, value in facts:
        grid.add_row(label, value)
    console.print(Padding(grid, (0, 0, 1, 2), expand=False))
