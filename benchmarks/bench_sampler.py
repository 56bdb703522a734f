"""What a memory profile of 100 readings a second costs: the processor time of its thread, and a busy loop with and without it.

    python benchmarks/bench_sampler.py [--held-mib 0 2048] [--repeats 15] [--seconds 10] [--json FILE]

The loops take about half a second each and are timed in turn, with the profile and without. One computes in Python, so that
the sampler must wait for the interpreter lock, the other in torch, which has given it up. `--held-mib` is memory that the process
holds meanwhile: the kernel walks all of its pages for the proportional set size. Beside the medians stands the load of the machine
before the run: other processes make the loops' times vary by more than the sampler does; the thread's own time they change
little.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import shardwise as sw
from harness import write_figures

_INTERVAL_SECONDS: Final = 0.01
_LOOP_SECONDS: Final = 0.5
_MIB: Final = 1 << 20


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-mib", type=int, nargs="+", default=[0, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the profile whose thread is timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    load_before = os.getloadavg()
    console.print(f"load of the machine over 1, 5 and 15 minutes: {load_before}")
    loops = {"python": _python_loop, "torch": _torch_loop}
    rounds = {name: _rounds(loop) for name, loop in loops.items()}
    floor = _wake_microseconds(options.seconds)
    console.print(
        f"a thread that wakes up 100 times a second and does nothing: {floor:.0f} us of a core each time"
    )
    runs = []
    for held_mib in options.held_mib:
        held = mmap.mmap(-1, max(1, held_mib) * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(held, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
        run: dict[str, Any] = {"held_mib": held_mib, "idle": _thread_cost(options.seconds)}
        for name, loop in loops.items():
            run[name] = _with_and_without(loop, rounds[name], options.repeats)
        runs.append(run)
        held.close()
    load_after = os.getloadavg()
    table = Table(
        "held, MiB", "while", "readings/s", "thread, % of a core", "loop without, s", "with, s", "more, %"
    )
    for run in runs:
        idle = run["idle"]
        table.add_row(
            str(run["held_mib"]),
            "asleep",
            f"{idle['readings_per_second']:.0f}",
            f"{idle['thread_percent']:.2f}",
            "",
            "",
            "",
        )
        for name in loops:
            found = run[name]
            table.add_row(
                str(run["held_mib"]),
                name,
                f"{found['readings_per_second']:.0f}",
                f"{found['thread_percent']:.2f}",
                f"{found['without_seconds']:.4f}",
                f"{found['with_seconds']:.4f}",
                f"{found['more_percent']:+.2f}",
            )
    console.print(table)
    write_figures(
        options.json,
        "sampler",
        options,
        floor="the same loop without a profile",
        load_before=load_before,
        load_after=load_after,
        wake_microseconds=floor,
        runs=runs,
    )


def _python_loop(rounds: int) -> int:
    total = 0
    for value in range(rounds):
        total += value & 7
    return total


def _torch_loop(rounds: int) -> torch.Tensor:
    matrix = torch.full((512, 512), 0.5)
    for _ in range(rounds):
        result = matrix @ matrix
    return result


def _rounds(loop: Callable[[int], object]) -> int:
    """Return how many rounds take about half a second."""
    rounds = 16
    while True:
        before = time.perf_counter()
        loop(rounds)
        seconds = time.perf_counter() - before
        if seconds > _LOOP_SECONDS / 4:
            return max(1, int(rounds * _LOOP_SECONDS / seconds))
        rounds *= 4


def _thread_seconds(profile: sw.MemoryProfile) -> float:
    """Return the processor time that the profile's thread has used so far."""
    thread = profile._thread
    if thread is None or thread.ident is None:
        raise RuntimeError("expected a profile that runs")
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _wake_microseconds(seconds: float) -> float:
    """Return the processor time of one wake-up, of which a sampler in a thread of Python cannot cost less."""
    wakes, spent = round(seconds / _INTERVAL_SECONDS), 0.0

    def wake_up() -> None:
        nonlocal spent
        never = threading.Lock()
        never.acquire()
        before = time.thread_time()
        for _ in range(wakes):
            never.acquire(timeout=_INTERVAL_SECONDS)
        spent = time.thread_time() - before

    thread = threading.Thread(target=wake_up)
    thread.start()
    thread.join()
    return 1e6 * spent / wakes


def _thread_cost(seconds: float) -> dict[str, float]:
    with sw.profile_memory("cpu", interval_seconds=_INTERVAL_SECONDS) as profile:
        time.sleep(seconds)
        return _thread_figures(profile)


def _thread_figures(profile: sw.MemoryProfile) -> dict[str, float]:
    elapsed = profile.seconds
    return {
        "thread_percent": 100 * _thread_seconds(profile) / elapsed,
        "readings_per_second": len(profile.readings) / elapsed,
    }


def _with_and_without(loop: Callable[[int], object], rounds: int, repeats: int) -> dict[str, Any]:
    times: dict[bool, list[float]] = {False: [], True: []}
    threads: list[dict[str, float]] = []
    for repeat in range(repeats):
        # In turn, and each first as often as the other: what the machine does besides falls on both.
        for is_profiled in (False, True) if repeat % 2 == 0 else (True, False):
            if is_profiled:
                with sw.profile_memory("cpu", interval_seconds=_INTERVAL_SECONDS) as profile:
                    times[True].append(_timed(loop, rounds))
                    threads.append(_thread_figures(profile))
            else:
                times[False].append(_timed(loop, rounds))
    without, profiled = (statistics.median(times[is_profiled]) for is_profiled in (False, True))
    return {
        "without_seconds": without,
        "with_seconds": profiled,
        "more_percent": 100 * (profiled / without - 1),
        "thread_percent": statistics.median(figures["thread_percent"] for figures in threads),
        "readings_per_second": statistics.median(figures["readings_per_second"] for figures in threads),
        "all_without_seconds": times[False],
        "all_with_seconds": times[True],
    }


def _timed(loop: Callable[[int], object], rounds: int) -> float:
    before = time.perf_counter()
    loop(rounds)
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
