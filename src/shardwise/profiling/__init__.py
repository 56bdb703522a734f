"""Memory over time, phases, and the report of a load."""

from shardwise.profiling.columns import MemoryPeaks
from shardwise.profiling.device import device_reader
from shardwise.profiling.load_report import LoadReport, RankReport
from shardwise.profiling.node import own_node
from shardwise.profiling.phases import PhaseSpan, phase
from shardwise.profiling.readings import MemoryReading, host_reader
from shardwise.profiling.sampler import MemoryProfile, profile_memory
from shardwise.profiling.saved import PROFILE_SCHEMA
from shardwise.profiling.timeline import Figure, Timeline, node_increase, node_peak_bytes
from shardwise.profiling.traffic import Traffic

__all__ = [
    "PROFILE_SCHEMA",
    "Figure",
    "LoadReport",
    "MemoryPeaks",
    "MemoryProfile",
    "MemoryReading",
    "PhaseSpan",
    "RankReport",
    "Timeline",
    "Traffic",
    "device_reader",
    "host_reader",
    "node_increase",
    "node_peak_bytes",
    "own_node",
    "phase",
    "profile_memory",
]
