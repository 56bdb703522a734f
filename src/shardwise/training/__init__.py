"""Fine-tuning on shards: data, steps, checkpoints, on the facade."""

from shardwise.training.checkpoints import CHECKPOINTS, newest_first, newest_whole
from shardwise.training.resuming import refuse_checkpoints
from shardwise.training.run import train
from shardwise.training.sample import sample_text
from shardwise.training.settings import LoraSettings, TrainSettings

__all__ = [
    "CHECKPOINTS",
    "LoraSettings",
    "TrainSettings",
    "newest_first",
    "newest_whole",
    "refuse_checkpoints",
    "sample_text",
    "train",
]
