"""Which rows each step trains on: a function of the seed, the step and the rows of a step, whatever the number of ranks.

torch's `DistributedSampler` shuffles each epoch by the seed and the epoch's number. Here it deals to one rank, so that a batch is
the whole job's, and each rank takes its part of it. What an epoch has beyond whole steps is left out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from torch.utils.data import BatchSampler, DistributedSampler

from shardwise.errors import DataError


class DataOrder:
    """The order of training rows.

    Args:
        rows: Of the training data.
        batch_size: Rows of a step, over all ranks.
        seed: Of the shuffling.

    Raises:
        DataError: There are fewer rows than one step takes.
    """

    def __init__(self, *, rows: int, batch_size: int, seed: int) -> None:
        if rows < batch_size:
            raise DataError(
                f"expected at least one step's rows ({batch_size}) to train on, got {rows}. Use more text, a shorter --block-size or "
                "a smaller --batch-size."
            )
        self.steps_of_epoch = rows // batch_size
        dataset = cast(Any, range(rows))  # of which the length alone is asked
        self._sampler: DistributedSampler[int] = DistributedSampler(
            dataset, num_replicas=1, rank=0, shuffle=True, seed=seed
        )
        self._batches = BatchSampler(self._sampler, batch_size, drop_last=True)

    def from_step(self, step: int) -> Iterator[list[int]]:
        """Yield the whole job's rows of one step after the other, without end.

        Args:
            step: The first one, from 0.
        """
        epoch, position = divmod(step, self.steps_of_epoch)
        while True:
            self._sampler.set_epoch(epoch)
            yield from islice(self._batches, position, None)
            epoch, position = epoch + 1, 0


def part_of(rows: list[int], *, rank: int, ranks: int) -> list[int]:
    """Return one rank's part of a step's rows: a run, as long as the others'."""
    each = len(rows) // ranks
    return rows[rank * each : (rank + 1) * each]
