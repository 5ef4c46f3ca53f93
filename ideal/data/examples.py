"""A set of tokenised examples as three flat arrays: small, memory-mappable, and without pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from ideal.data.chat import Example


class ExampleSet:
    """n examples of altogether N tokens.

    Attributes:
        ids: [N] token ids.
        supervised: [N] which of them are trained on.
        offsets: [n + 1] where each example begins in them.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        supervised: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
    ) -> None:
        self.ids, self.supervised, self.offsets = ids, supervised, offsets

    @classmethod
    def of(cls, examples: Sequence[Example]) -> ExampleSet:
        lengths = [len(e.ids) for e in examples]
        return cls(
            np.fromiter((t for e in examples for t in e.ids), np.int32, sum(lengths)),
            np.fromiter((s for e in examples for s in e.supervised), np.bool_, sum(lengths)),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and mask of one example, [length] each."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.supervised[span]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        return (self[i] for i in range(len(self)))

    def supervised_tokens(self) -> npt.NDArray[np.int64]:
        """[n] targets in each example: supervised tokens that have a token before them to be predicted from."""
        total = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        counts: npt.NDArray[np.int64] = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return counts - self.supervised[self.offsets[:-1]]

    def where(self, kept: npt.NDArray[np.bool_]) -> ExampleSet:
        """The examples that ``kept`` [n] names, in their order."""
        lengths = np.diff(self.offsets)
        tokens = np.repeat(kept, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        return ExampleSet(self.ids[tokens], self.supervised[tokens], offsets)

    def digest(self) -> str:
        """Checksum of all that is in it."""
        found = hashlib.sha256()
        for array in (self.offsets, self.ids, self.supervised):
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def save(self, path: Path) -> None:
        save_file({"ids": self.ids, "supervised": self.supervised, "offsets": self.offsets}, path)

    @classmethod
    def load(cls, path: Path) -> ExampleSet:
        arrays = load_file(path)
        return cls(arrays["ids"], arrays["supervised"], arrays["offsets"])
