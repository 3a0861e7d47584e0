"""A decoder as one backend stores it: the bytes of its weights, by the adapter's own arithmetic.

``SizedModel.of(decoder, backend)`` needs a backend that was fitted to the shapes of `layer_shapes`. Exact:
held against the bytes in the committed records (tests/test_footprint.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.ask.shapes import Decoder
from bench.load.contract import DTYPE_BYTES, Backend, Shape, Workspace


@dataclass(frozen=True)
class SizedModel:
    """A decoder as one backend stores it, in bytes."""

    decoder: Decoder
    backend: Backend
    width: int
    """Bytes of a number in the compute dtype."""
    layer_packed: int
    """Packed weights with their metadata of one decoder layer."""
    layer_unquantized: int
    embedding: int
    """Of the embedding, and again of a head of its own."""
    last_norm: int

    @classmethod
    def of(cls, decoder: Decoder, backend: Backend) -> SizedModel:
        """``backend`` has been fitted to the shapes (`Backend.fit`)."""
        width = DTYPE_BYTES[backend.dtype]
        packed = sum(packed_bytes(backend, shape) for shape in layer_shapes(decoder).values())
        return cls(
            decoder,
            backend,
            width,
            packed,
            width * decoder.layer_unquantized_parameters,
            width * decoder.embedding_parameters,
            width * decoder.hidden,
        )

    def workspaces(self, tokens: int) -> dict[str, Workspace]:
        """Of each linear layer of a decoder layer."""
        return {
            name: self.backend.workspace(shape, tokens) for name, shape in layer_shapes(self.decoder).items()
        }


def layer_shapes(decoder: Decoder) -> dict[str, Shape]:
    """The linear layers of one decoder layer, in the contract's terms."""
    return {name: Shape(linear.outputs, linear.inputs) for name, linear in decoder.linears.items()}


def packed_bytes(backend: Backend, shape: Shape) -> int:
    """Codes and metadata of one layer, its bias excluded, by the adapter's arithmetic."""
    return round(backend.expected_bits(shape) * shape.weights / 8)
