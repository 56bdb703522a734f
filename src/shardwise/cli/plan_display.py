"""A plan as tables in a terminal, and as plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.text import Text

from shardwise.planning import JobPlan, Way
from shardwise.planning.training_state import TrainingState
from shardwise.report.fitted import FilledColumn, print_fitted
from shardwise.report.units import format_bytes, format_seconds

_NONE = "-"


def show_plan(plan: JobPlan) -> None:
    """Print what a job would cost.

    In a terminal that is too narrow, memory, reading and moving are tables of their own.

    Args:
        plan: Of the job.
    """
    console = Console(highlight=False)
    nodes = -(-plan.load.ranks // plan.ranks_per_node)
    _say(
        console,
        f"{plan.load.title}; {nodes} node{'s' * (nodes > 1)} of {plan.ranks_per_node} rank{'s' * (plan.ranks_per_node > 1)}",
    )
    console.print()
    ways = _names("at load", [_name(way) for way in plan.ways])
    for names, *groups in (
        (ways, _memory(plan.ways), _read(plan.ways), _moved(plan.ways)),
        _training(plan.training, plan.ranks_per_node),
    ):
        print_fitted(console, names, groups, box=box.SIMPLE_HEAD if console.is_terminal else None)
        console.print()
    for note in _notes(plan):
        _say(console, note)
    if plan.verdict is not None:
        _say(console, f"{plan.load.route} {plan.verdict.text}.")


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _names(header: str, cells: Sequence[str]) -> FilledColumn:
    return FilledColumn(header=header, cells=cells, justify="left")


def _name(way: Way) -> str:
    return f"{way.name} (taken)" if way.chosen else way.name


def _memory(ways: Sequence[Way]) -> list[FilledColumn]:
    columns = [
        _column("host,\na rank", (_bytes(way.cost.host_peak_bytes) for way in ways)),
        _column("host,\na node", (_bytes(way.cost.node_host_peak_bytes) for way in ways)),
        _column("device", (_bytes(way.cost.device_peak_bytes) for way in ways)),
    ]
    if any(way.fits is not None for way in ways):
        columns.append(_column("fits, with\ntraining", ("yes" if way.fits else "NO" for way in ways)))
    return columns


def _read(ways: Sequence[Way]) -> list[FilledColumn]:
    return [
        _column("read,\nthe job", (_bytes(way.cost.storage_bytes) for way in ways)),
        _column("read,\na node", (_bytes(way.cost.node_storage_bytes) for way in ways)),
        _column("read,\na rank", (_bytes(way.cost.rank_storage_bytes) for way in ways)),
        _column(
            "mean\nread", (None if w.mean_read_bytes is None else _bytes(w.mean_read_bytes) for w in ways)
        ),
        _column("files,\na rank", (None if w.rank_files is None else f"{w.rank_files:,}" for w in ways)),
    ]


def _moved(ways: Sequence[Way]) -> list[FilledColumn]:
    columns = [
        _column("moved,\nthe job", (_bytes(way.cost.network_bytes) for way in ways)),
        _column("moved,\na node", (_bytes(way.cost.node_network_bytes) for way in ways)),
        _column("moved,\na rank", (_bytes(way.cost.rank_network_bytes) for way in ways)),
    ]
    if any(way.seconds is not None for way in ways):
        columns.append(
            _column("seconds", (None if way.seconds is None else format_seconds(way.seconds) for way in ways))
        )
    return columns


def _column(header: str, figures: Iterable[str | None]) -> FilledColumn:
    cells = [_NONE if figure is None else figure for figure in figures]
    return FilledColumn(header=header, cells=cells, justify="right")


def _training(state: TrainingState, ranks_per_node: int) -> tuple[FilledColumn, list[FilledColumn]]:
    on_shards = "host" if state.in_host_memory else "device"
    on_gathering = "host" if state.gathers_in_host_memory else "device"
    rows: list[tuple[str, str, int]] = []
    for name, by_dtype in (
        ("parameters", state.parameters),
        ("gradients", state.gradients),
        (f"optimizer ({state.optimizer})", state.optimizer_states),
    ):
        rows += [(f"{name}, {dtype}", on_shards, nbytes) for dtype, nbytes in by_dtype.items()]
    if state.pinned_bytes:
        rows.append(("pinning rounds up", on_shards, state.pinned_bytes))
    if state.buffer_bytes:
        rows.append(("buffers", on_gathering, state.buffer_bytes))
    rows.append(("gathered by FSDP2, at most", on_gathering, state.gathered_bytes))
    rows.append(("optimizer's step, at most", on_shards, state.step_bytes))
    if state.host_bytes:
        rows.append(("at most, together", "host", state.host_bytes))
    if state.device_bytes:
        rows.append(("at most, together", "device", state.device_bytes))
    return (
        _names("in training", [name for name, _, _ in rows]),
        [
            _column("in", (where for _, where, _ in rows)),
            _column("a rank", (_bytes(nbytes) for _, _, nbytes in rows)),
            _column("a node", (_bytes(ranks_per_node * nbytes) for _, _, nbytes in rows)),
        ],
    )


def _notes(plan: JobPlan) -> list[str]:
    notes = plan.load.notes()
    notes.append(
        "Host memory is what has no file behind it, above what imports and the empty model take; pages of mapped files come beside it, and can be "
        "dropped. What is gathered and what a step makes are not there at one time. Activations are not counted."
    )
    notes.append(
        "Not predicted: transformers' DistributedConfig and DCP's Hugging Face reader, which `shardwise compare --peers` measures."
    )
    accelerate = next((way for way in plan.ways if way.training.parameters != plan.training.parameters), None)
    if accelerate is not None:
        state = accelerate.training
        most = state.host_bytes if state.in_host_memory else state.device_bytes
        notes.append(f"{accelerate.name}, trains in float32: {_bytes(most)} a rank.")
    rates = plan.rates
    if rates.read_bytes_per_second or rates.link_bytes_per_second:
        said = [
            f"{rate / 1e9:.3g} GB/s {what}"
            for rate, what in (
                (rates.read_bytes_per_second, "from storage to a node"),
                (rates.link_bytes_per_second, "to or from a rank"),
            )
            if rate is not None
        ]
        notes.append(f"Seconds at {' and '.join(said)}, without start-up, casts and copies to devices.")
        if any(way.seconds is None for way in plan.ways):
            rate = "--link-gbps" if rates.link_bytes_per_second is None else "--read-gbps or --measure-read"
            notes.append(f"Seconds of ways with - are known with {rate} too.")
    return notes


def _bytes(count: int) -> str:
    return "0" if count == 0 else format_bytes(count, unit=None)
