"""All that a training needs to go on from the end of an epoch, as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cellstore.errors import StorageError, first_line

_HEADER = "cellstore"


@dataclass(frozen=True)
class TrainingState:
    """Tensors (on the CPU) by name, and a record of plain JSON values."""

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The file; the record stands in its header."""
        text = json.dumps(dict(self.record), sort_keys=True)
        whole = {name: value.contiguous() for name, value in self.tensors.items()}
        return save_tensors(whole, {_HEADER: text})

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingState:
        """The state in a file; no code in it is run. Raises ``StorageError`` if it is damaged."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            return cls(load_tensors(data), json.loads(header["__metadata__"][_HEADER]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"The state of a training is damaged ({first_line(error)}). Check the store with "
                "'cellstore verify', and train anew with --force."
            ) from error

    def beside(self, record: Mapping[str, Any]) -> TrainingState:
        """The same state with more in its record."""
        return TrainingState(self.tensors, {**self.record, **record})

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix`` and a dot, without both."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
