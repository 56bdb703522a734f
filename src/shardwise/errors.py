"""Every error that shardwise raises on purpose.

    ShardwiseError
    ├── ConfigurationError            an option is unknown, contradictory or not possible here
    │   ├── MissingDependencyError    an extra is not installed
    │   └── UnsupportedVersionError   an upstream release cannot do what is asked
    ├── ModelError                    the model itself
    │   ├── AlreadyWrappedError       wrapped twice
    │   ├── UnsupportedParameterError FSDP2 cannot shard this parameter
    │   └── LeftOnMetaError           a tensor would have stayed without storage
    ├── OptimizerError                an optimizer that cannot be rebound to the shards
    ├── CheckpointError               what is on disk, or in a state dict
    │   ├── ShapeMismatchError        a tensor is not of the shape that the model expects
    │   ├── DamagedFileError          truncated, or not what its format says
    │   ├── ChangedFileError          not the file any more that was described when the load began
    │   ├── StalledReadError          a read does not return
    │   └── UnsupportedFormatError    a format, dtype or quantisation that is not read
    ├── DataError                     a file of training data, or a line of it, cannot be used
    ├── DivergedError                 a training's loss, or the norm of its gradients, is not finite
    ├── OutOfMemoryError              host or device memory for a shard could not be had
    ├── RankError                     ranks do not agree
    │   ├── RankMismatchError         names, shapes, dtypes or values differ between ranks
    │   ├── PeerError                 another rank failed; its first error is in the message
    │   └── RankTimeoutError          a rank did not arrive within the timeout
    ├── CallOrderError                a method of the facade was called before or after its time
    └── CommandError                  a command line run could not be carried out

Each message says what was expected, what was found, where (file, tensor, rank), and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

_MOST_NAMES: Final = 5  # of tensors in a message


class ShardwiseError(Exception):
    """Base of all errors raised by shardwise on purpose."""


class ConfigurationError(ShardwiseError, ValueError):
    """An option is unknown, contradicts another one, or is not possible here."""


class MissingDependencyError(ConfigurationError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class UnsupportedVersionError(ConfigurationError):
    """An installed upstream release cannot do what is asked."""


class ModelError(ShardwiseError):
    """The model cannot be brought into FSDP2 form as it is."""


class AlreadyWrappedError(ModelError):
    """The model, or a part of it, was sharded before."""


class UnsupportedParameterError(ModelError):
    """FSDP2 cannot shard a parameter of this shape or dtype; the message names it and the remedy."""


class LeftOnMetaError(ModelError):
    """A parameter or buffer would have stayed on the meta device, without values."""


class OptimizerError(ShardwiseError):
    """An optimizer cannot be rebound to the sharded parameters."""


class CheckpointError(ShardwiseError):
    """A checkpoint, or a state dict in memory, does not hold what the model needs."""


class ShapeMismatchError(CheckpointError):
    """A tensor's shape is not the one that the model expects."""


class DamagedFileError(CheckpointError):
    """A file is truncated, or its contents contradict each other or the format."""


class ChangedFileError(CheckpointError):
    """A file is not the one any more that was described when the load began."""


class StalledReadError(CheckpointError, TimeoutError):
    """A read has not returned within the timeout; the message names the file and the rank."""


class UnsupportedFormatError(CheckpointError):
    """A file format, dtype or quantisation that shardwise does not read; the message names the remedy."""


class DataError(ShardwiseError):
    """A file of training data, or a line of it, cannot be used; the message names the line."""


class DivergedError(ShardwiseError):
    """A training's loss, or the norm of its gradients, is not a finite number."""


class OutOfMemoryError(ShardwiseError, MemoryError):
    """Host or device memory for a shard or a buffer could not be had; the message says how much, and where."""


class RankError(ShardwiseError):
    """The ranks of a job do not agree, or one of them failed."""


class RankMismatchError(RankError):
    """Names, shapes, dtypes, options or values differ between ranks."""


class PeerError(RankError):
    """Another rank failed first; the message carries that rank's error."""


class RankTimeoutError(RankError, TimeoutError):
    """A rank did not arrive, or made no progress, within the timeout."""


class CallOrderError(ShardwiseError, RuntimeError):
    """A method of the facade was called before or after its time; the message says which call comes first."""


class CommandError(ShardwiseError):
    """A command could not be carried out; the message says what to do."""


def listed(names: Sequence[str]) -> str:
    """Return names of tensors as text: the first few, and how many more they are.

    Args:
        names: In the order in which they are said.
    """
    return shortened(names, most=_MOST_NAMES, between=", ")


def shortened(words: Sequence[object], *, most: int, between: str) -> str:
    """Return the first of some words as text, and how many more they are.

    Args:
        words: In the order in which they are said.
        most: How many of them are said.
        between: Stands between two.
    """
    more = len(words) - most
    return between.join(map(str, words[:most])) + (f" and {more:,} more" if more > 0 else "")


def did_you_mean(given: object, known: Iterable[str], *, other_words: Mapping[str, str]) -> str:
    """Return " Did you mean 'x'?" for a word that is close to a known one, else an empty text; to end a message with.

    Args:
        given: What was given.
        known: The words that can be given.
        other_words: What else a known one is called, in lower case.
    """
    word = str(given).lower()
    words = list(known)
    close = difflib.get_close_matches(word, [*words, *other_words], n=1)
    begun = [each for each in words if word and each.startswith(word)]
    found = close[0] if close else begun[0] if len(begun) == 1 else None
    return f" Did you mean {other_words.get(found, found)!r}?" if found is not None else ""
