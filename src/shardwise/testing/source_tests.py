"""What every source of tensor bytes must do; subclass `SourceTests` and say how to make one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from shardwise.checkpoint import Run, Source
from shardwise.errors import CheckpointError


class SourceTests(ABC):
    """A conformance suite for pytest.

    Subclasses are named `Test…` and implement `make`.
    """

    values: Mapping[str, torch.Tensor] = {
        "matrix": torch.arange(35, dtype=torch.float32).view(5, 7),
        "vector": torch.arange(9, dtype=torch.int16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "half": torch.linspace(-1, 1, 12).to(torch.bfloat16).view(3, 4),
    }

    @abstractmethod
    def make(self, values: Mapping[str, torch.Tensor], directory: Any) -> Source:
        """Return a source that holds these tensors; `directory` is empty and may be used."""

    def test_names_shapes_and_dtypes(self, tmp_path: Any) -> None:
        """The catalogue is that of the tensors."""
        source = self.make(self.values, tmp_path)
        found = {name: (stored.shape, stored.dtype) for name, stored in source.tensors.items()}
        self._equal(found, {name: (tuple(value.shape), value.dtype) for name, value in self.values.items()})

    def test_every_range_of_bytes(self, tmp_path: Any) -> None:
        """Any part of a tensor reads as the bytes that it has."""
        source = self.make(self.values, tmp_path)
        for name, value in self.values.items():
            stored, content = source.tensors[name], _bytes_of(value)
            for start in range(0, len(content), 3):
                for stop in {start, start + 1, (start + len(content)) // 2, len(content)}:
                    if start <= stop:
                        got = bytearray(stop - start)
                        source.read_into(stored.file, stored.start + start, memoryview(got))
                        self._equal(bytes(got), content[start:stop])

    def test_a_range_beyond_the_end_is_an_error(self, tmp_path: Any) -> None:
        """A read past the last byte raises and does not return less."""
        source = self.make(self.values, tmp_path)
        last = max(source.tensors.values(), key=lambda stored: stored.stop)
        try:
            source.read_into(last.file, last.stop - 1, memoryview(bytearray(2)))
        except CheckpointError:
            return
        raise RuntimeError("expected a CheckpointError for a read beyond the end")

    def test_many_threads(self, tmp_path: Any) -> None:
        """Reads at the same time do not disturb each other."""
        source = self.make(self.values, tmp_path)

        def read(name: str) -> bytes:
            stored = source.tensors[name]
            got = bytearray(stored.nbytes)
            source.read_into(stored.file, stored.start, memoryview(got))
            return bytes(got)

        names = [name for name in self.values for _ in range(20)]
        with ThreadPoolExecutor(8) as pool:
            for name, content in zip(names, pool.map(read, names), strict=True):
                self._equal(content, _bytes_of(self.values[name]))

    def test_mapped_tensors_are_private(self, tmp_path: Any) -> None:
        """Writing to what is mapped changes neither the source nor what another call maps, before or after."""
        source = self.make(self.values, tmp_path)
        stored, content = source.tensors["matrix"], _bytes_of(self.values["matrix"])
        run = Run(file=stored.file, start=stored.start, dtype=stored.dtype, numel=35)
        first, before = source.mapped([run])[0], source.mapped([run])[0]
        if first is None or before is None:
            self._equal((first, before), (None, None))
            return
        self._equal(_bytes_of(first), content)
        first.zero_()
        after = source.mapped([run])[0]
        self._equal([_bytes_of(t) if t is not None else None for t in (before, after)], [content, content])
        got = bytearray(stored.nbytes)
        source.read_into(stored.file, stored.start, memoryview(got))
        self._equal(bytes(got), content)
        source.close()
        self._equal(float(first.sum()), 0.0)

    def test_what_is_mapped_comes_in_order(self, tmp_path: Any) -> None:
        """A call answers each run in its place, with None or with the tensor's elements; no run is no answer."""
        source = self.make(self.values, tmp_path)
        self._equal(source.mapped([]), [])
        names = ["half", "matrix", "vector", "half"]
        runs = [
            Run(file=s.file, start=s.start, dtype=s.dtype, numel=self.values[s.name].numel())
            for s in (source.tensors[name] for name in names)
        ]
        found = source.mapped(runs)
        self._equal(len(found), len(runs))
        for name, got in zip(names, found, strict=True):
            if got is not None:
                self._equal(
                    (got.dtype, tuple(got.shape)), (self.values[name].dtype, (self.values[name].numel(),))
                )
                self._equal(_bytes_of(got), _bytes_of(self.values[name]))

    def test_what_no_file_holds_is_not_mapped(self, tmp_path: Any) -> None:
        """A run beyond the end, and one without elements, has no pages."""
        source = self.make(self.values, tmp_path)
        last = max(source.tensors.values(), key=lambda stored: stored.stop)
        beyond = Run(file=last.file, start=last.start, dtype=torch.uint8, numel=last.nbytes + 1)
        nothing = Run(file=last.file, start=last.start, dtype=torch.uint8, numel=0)
        self._equal(source.mapped([beyond, nothing]), [None, None])

    def test_closing_twice(self, tmp_path: Any) -> None:
        """Closing is safe to repeat, and nothing has changed without a change."""
        source = self.make(self.values, tmp_path)
        source.read_into(
            source.tensors["matrix"].file, source.tensors["matrix"].start, memoryview(bytearray(4))
        )
        source.require_unchanged()
        source.close()
        source.close()

    @staticmethod
    def _equal(got: object, expected: object) -> None:
        if got != expected:
            raise RuntimeError(f"expected {expected!r}, got {got!r}")


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
