"""The program of one local rank: `python -P rank.py REQUEST_FILE`.

It is run by its path, so that nothing is imported before its output goes to its log.

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


def _run(request_file: Path) -> None:
    request = json.loads(request_file.read_text(encoding="utf-8"))
    sys.path[:] = request["import_path"]
    module, name = request["worker"].split(":")
    worker: Worker = getattr(importlib.import_module(module), name)
    result = json.dumps(worker(request["arguments"]))
    result_file(request_file.parent, rank=int(os.environ["RANK"])).write_text(result, encoding="utf-8")


def _log_to_files(directory: Path) -> None:
    # Not left to the launcher, which in torch 2.13 never closes the files that it opens for this.
    for descriptor, name in ((1, "stdout.log"), (2, "stderr.log")):
        file = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)


def record_whole(error: BaseException) -> None:
    """Write torch's error file of this rank, which is there with all of its text or not at all.

    The launcher reads it when it has seen a rank fail, and stops the other ranks, which may be writing theirs;
    a file that is cut short raises in the launcher, in place of the failure.
    """
    from torch.distributed.elastic.multiprocessing.errors.handlers import get_error_handler

    whole = os.environ["TORCHELASTIC_ERROR_FILE"]
    part = f"{whole}.part"
    os.environ["TORCHELASTIC_ERROR_FILE"] = part
    try:
        get_error_handler().record_exception(error)
    finally:
        os.environ["TORCHELASTIC_ERROR_FILE"] = whole
    os.replace(part, whole)


def _main(request_file: Path) -> int:
    _log_to_files(Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent)
    # Only now: what happens during this import belongs into the log too.
    from torch.distributed.elastic.multiprocessing.errors.handlers import get_error_handler

    get_error_handler().initialize()
    status = 0
    try:
        _run(request_file)
    except Exception as error:
        record_whole(error)
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    # Left without the interpreter's teardown: native threads that are still joinable by then make it abort
    # now and then, and the status of a rank must not be a matter of chance. The result is on disk.
    os._exit(_main(Path(sys.argv[1])))
