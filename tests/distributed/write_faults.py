"""Run every fault on every route and write what the ranks saw to `docs/faults.md`.

python -m tests.distributed.write_faults
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from shardwise.testing import RankPool
from tests.distributed.call_faults import CALL_FAULTS, run_call_fault
from tests.distributed.call_faults import RANKS as CALL_RANKS
from tests.distributed.fault_calls import write_models
from tests.distributed.faults import FAULTS, RANKS, ROUTES, Seen, run_fault, write_files

TARGET = Path(__file__).parents[2] / "docs" / "faults.md"
_LONGEST = 220  # characters of a message


def main() -> None:
    """Write the table."""
    lines = [
        "# What a user sees when something goes wrong",
        "",
        "Each fault below was put into `sw.materialize` on one of four ranks (a 2 x 2 mesh of replicas and shards, ranks 0, 1 and",
        "2, 3 as two nodes), on each route where it can happen; *state dict* is the route from rank 0's memory. Where another call is",
        "named in place of routes, there were two ranks. All ranks raised within the seconds given, and the same call made again in the",
        "same processes, without the fault, went well: what it loads was equal.",
        "`python -m tests.distributed.write_faults` wrote this page; `tests/distributed/test_faults.py` holds it.",
        "",
        "Two things cannot be told at once. A `group=` that is no group names no ranks: those of the default group are told, and ranks whose",
        "own `group=` is a part of it wait for the one that is missing until their timeout, and name it. Before there is a process group",
        "nobody can be told: a strategy that makes one ends with torch's own timeout on the others.",
        "",
        "| fault | phase | routes, or call | on the rank that has it | on the others | slowest, s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder, RankPool(RANKS) as pool:
        directory = write_files(Path(folder))
        for number, fault in enumerate(FAULTS):
            routes = [route for route in ROUTES if route in fault.routes]
            seen = {
                route: pool.run(run_fault, str(directory), number, route, ranks=RANKS) for route in routes
            }
            first = seen[routes[0]]
            at = fault.on(routes[0])
            other = first[0 if at else 1]
            slowest = max(of_rank.seconds for of_route in seen.values() for of_rank in of_route)
            shown = _shown(first[at], folder), _shown(other, folder)
            print(f"{fault.name}: {', '.join(routes)}", flush=True)
            lines.append(_row(fault.name, fault.phase, ", ".join(routes), *shown, f"{slowest:.1f}"))
        lines += _other_calls(pool, folder)
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _other_calls(pool: RankPool, folder: str) -> list[str]:
    lines = []
    directory = write_models(Path(folder))
    for number, fault in enumerate(CALL_FAULTS):
        seen = pool.run(run_call_fault, str(directory), number, ranks=CALL_RANKS)
        slowest = max(of_rank.seconds for of_rank in seen)
        shown = _shown(seen[fault.on], folder), _shown(seen[1 - fault.on], folder)
        print(f"{fault.name}: {fault.call}", flush=True)
        lines.append(_row(fault.name, fault.phase, fault.call, *shown, f"{slowest:.1f}"))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(seen: Seen, folder: str) -> str:
    text = " ".join(seen.text.replace(folder, "DIRECTORY").split())
    text = re.sub(r" on [\w.-]+ failed first", " on HOST failed first", text)
    text = re.sub(r"\(([\w.-]+)\), got", "(HOST), got", text)
    shown = text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " …"
    return f"`{seen.error}`: {shown}"


if __name__ == "__main__":
    main()
