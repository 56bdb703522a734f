"""Fine-tuning on shards: data, steps, checkpoints, on the facade."""

from shardwise.training.run import train
from shardwise.training.sample import sample_text
from shardwise.training.settings import LoraSettings, TrainSettings

__all__ = ["LoraSettings", "TrainSettings", "sample_text", "train"]
