"""Where tensor bytes come from."""

from shardwise.checkpoint.checkpoint_files import require_files
from shardwise.checkpoint.described import DescribedSource
from shardwise.checkpoint.hub import (
    cached_snapshot,
    download_snapshot,
    downloaded_bytes,
    fetch_descriptions,
    snapshot_revision,
)
from shardwise.checkpoint.hub_access import HubAccess
from shardwise.checkpoint.hub_headers import fetch_headers
from shardwise.checkpoint.locate import Location, locate
from shardwise.checkpoint.pickle_file import PICKLE_ENDINGS, load_pickle
from shardwise.checkpoint.regular_file import read_text
from shardwise.checkpoint.safetensors_source import SafetensorsSource
from shardwise.checkpoint.source import Readable, Run, Source, fetch_mapped, read_scattered, stitched
from shardwise.checkpoint.state_dict import StateDictSource
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.checkpoint.syncing import sync, write_whole

__all__ = [
    "PICKLE_ENDINGS",
    "DescribedSource",
    "HubAccess",
    "Location",
    "Readable",
    "Run",
    "SafetensorsSource",
    "Source",
    "StateDictSource",
    "StoredTensor",
    "cached_snapshot",
    "download_snapshot",
    "downloaded_bytes",
    "fetch_descriptions",
    "fetch_headers",
    "fetch_mapped",
    "load_pickle",
    "locate",
    "read_scattered",
    "read_text",
    "require_files",
    "snapshot_revision",
    "stitched",
    "sync",
    "write_whole",
]
