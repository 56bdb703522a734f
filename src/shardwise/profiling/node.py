"""Which machine a rank is on."""

from __future__ import annotations

import os
import socket


def own_node() -> str:
    """Return a name for the node that this rank is on: ranks of one node have the same.

    Two launcher agents on one machine count as two nodes, as torchrun numbers them (`GROUP_RANK`).
    """
    group = os.environ.get("GROUP_RANK")
    return socket.gethostname() if group in (None, "", "0") else f"{socket.gethostname()}#{group}"
