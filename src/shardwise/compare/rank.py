"""The entry of one local rank: `python -m shardwise.compare.rank REQUEST_FILE`.

The request says which function to call with what; its result is written beside the request. A failure
is recorded in torch's error file, from which the launcher reads it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

# What a rank runs: takes and returns what JSON can hold.
Worker = Callable[[Mapping[str, Any]], Any]


def worker_path(worker: Worker) -> str:
    """Return `module:name`, under which another process finds a module-level function.

    Raises:
        ValueError: It is not a module-level function of an importable module.
    """
    module, name = worker.__module__, worker.__qualname__
    if module == "__main__" or "." in name:
        raise ValueError(f"{module}:{name} is not a module-level function of an importable module")
    return f"{module}:{name}"


def result_file(directory: Path, *, rank: int) -> Path:
    """Return where the result of `rank` is written."""
    return directory / f"result-{rank}.json"


@record
def _run(request_file: Path) -> None:
    request = json.loads(request_file.read_text(encoding="utf-8"))
    sys.path[:] = request["import_path"]
    module, name = request["worker"].split(":")
    worker: Worker = getattr(importlib.import_module(module), name)
    result = json.dumps(worker(request["arguments"]))
    result_file(request_file.parent, rank=int(os.environ["RANK"])).write_text(result, encoding="utf-8")


def _main(request_file: Path) -> int:
    status = 0
    try:
        _run(request_file)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    # Left without the interpreter's teardown: native threads that are still joinable by then make it abort
    # now and then, and the status of a rank must not be a matter of chance. The result is on disk.
    os._exit(_main(Path(sys.argv[1])))
