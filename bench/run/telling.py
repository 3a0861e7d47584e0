"""How a worker tells its parent the parts of the record: each built and sent once it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.ask.packing import read_manifest
from bench.ask.stress import Pair
from bench.record.placement import PlaceFacts, PlacementFacts
from bench.record.schema import LoraFacts, Proof, Quantization, WorkloadFacts
from bench.record.stability import FirstFailure, StressedPair
from bench.run.events import Channel
from bench.run.order import Order
from bench.run.ranks import BY_PROCESS, LAUNCHER

if TYPE_CHECKING:
    from bench.load.contract import Backend, Shape
    from bench.load.lora import Adapters
    from bench.load.model import BuiltModel
    from bench.run.sharding import Cut
    from bench.run.workload import WorkloadReader


class Breach(Exception):
    """What the harness proved to be false: the run must not be measured."""


class Telling:
    """Sends the parts of one run's record."""

    def __init__(self, channel: Channel, order: Order) -> None:
        self.channel = channel
        self.order = order
        self.request = order.request
        self.communication: str | None = None
        """The backend between the processes of a run, where there are several."""
        self.cut: Cut | None = None
        """What was known of a model before it was cut over the processes."""
        self._proof = Proof()
        self._failure: FirstFailure | None = None

    def quantization(self, backend: Backend, built: BuiltModel, shapes: Mapping[str, Shape]) -> None:
        """What the backend did, and the proof of it. Raises Breach where it is not what it claims."""
        from bench.load.proof import layer_bits, quantization_breaches

        weights = sum(shape.weights for shape in shapes.values())
        layers = dict(built.quantized())
        packed = self.order.packed_folder
        manifest = read_manifest(packed) if packed else None
        calibration = manifest.calibration if manifest else "published" if packed else None
        if self.request.calibration == "random":
            calibration = "random"
        bits = (
            self.cut.bits
            if self.cut
            else {name: layer_bits(layer, shapes[name], backend.codes) for name, layer in layers.items()}
        )
        counted = sum(bits[name] * shapes[name].weights for name in layers)
        expected = sum(backend.expected_bits(shape) * shape.weights for shape in shapes.values())
        self.channel.section(
            "quantization",
            Quantization(
                kernel=", ".join(sorted({backend.kernel(layer) for layer in layers.values()})),
                layers=len(layers),
                weights=weights,
                requested_dtype=self.request.dtype,
                effective_dtype=backend.dtype,
                options=backend.options.model_dump(mode="json"),
                storage_bits_per_weight=counted / weights,
                expected_bits_per_weight=expected / weights,
                calibration=calibration,
                notes=(*backend.notes, *([self.order.note] if self.order.note else [])),
            ),
        )
        breaches = self.cut.breaches if self.cut else quantization_breaches(built, shapes, backend)
        self.prove(quantized=breaches)

    def placement(self, built: BuiltModel) -> None:
        """Where the model's parts are, and the proof of it. Raises Breach where one is elsewhere."""
        from bench.load.layout import misplaced

        layout = built.layout
        counts = layout.layers or (len(built.model.get_submodule("model.layers")),)  # type: ignore[arg-type]
        places = [
            PlaceFacts(device=place.label, decoder_layers=count)
            for place, count in zip(layout.places, counts, strict=True)
        ]
        self.channel.section(
            "placement",
            PlacementFacts(
                kind=self.request.placement,
                places=tuple(places),
                launcher=LAUNCHER if self.communication else None,
                communication=self.communication,
                wrapper=BY_PROCESS.get(self.request.placement),
            ),
        )
        self.prove(placed=misplaced(built.model, layout))

    def stress(self, pairs: Sequence[Pair], differences: Sequence[float] | None) -> None:
        """The rescaled pairs; ``differences``: what proves them, None where nothing could."""
        known: Sequence[float | None] = differences if differences is not None else [None] * len(pairs)
        self.channel.section(
            "stress",
            [
                StressedPair(
                    scaled=pair.scaled,
                    compensated=pair.compensated,
                    factor=pair.factor,
                    float32_difference=difference,
                )
                for pair, difference in zip(pairs, known, strict=True)
            ],
        )

    def lora(self, adapters: Adapters) -> None:
        """The adapters as attached."""
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in adapters.tensors.values()}
        self.channel.section(
            "lora",
            LoraFacts(
                parameters=sum(p.numel() for p in adapters.tensors.values()),
                tensors=len(adapters.tensors),
                names=tuple(adapters.tensors),
                dtype=", ".join(sorted(dtypes)),
                initial_digest=adapters.initial_digest,
                shapes_digest=adapters.shapes_digest,
            ),
        )

    def weights(self, broken: Mapping[str, str]) -> None:
        """Frozen weights that are not finite: a result and no breach."""
        sentences = tuple(f"{module}: {text}" for module, text in broken.items())
        self._proof = self._proof.model_copy(
            update={"weights_finite": not broken, "non_finite_weights": sentences}
        )
        self.channel.section("proof", self._proof)

    def workload(self, reader: WorkloadReader, backend: Backend) -> None:
        """The work as consumed so far."""
        self.channel.section(
            "workload",
            WorkloadFacts(
                source=reader.source,
                tokenizer=reader.tokenizer,
                examples=reader.examples,
                digest=reader.digest,
                tokens=reader.tokens,
                loss_tokens=reader.loss_tokens,
                batches_without_targets=reader.batches_without_targets,
                attention=self.request.attention,
                autocast_dtype=None if backend.dtype == "float32" else backend.dtype,
            ),
        )

    def consumed(self, told: str, received: str) -> None:
        """Digests of the work: as the reader told it, and as the model received it. Raises Breach where they
        differ."""
        breaches = []
        if told != received:
            breaches = [
                "the token ids, labels or masks that reached the model are not those of the digest: "
                "something between the reader and the model changes them"
            ]
        if breaches or self._proof.data_consumed is None:
            self.prove(data_consumed=breaches)

    def failure(self, failure: FirstFailure | None) -> None:
        """The first failure, each time that another one takes its place."""
        if failure is not None and failure is not self._failure:
            self._failure = failure
            self.channel.section("first_failure", failure)

    def prove(self, *, first_gradients_finite: bool | None = None, **breaches: Sequence[str]) -> None:
        """Tell what was proven: each keyword names a field of `Proof` with the sentences that speak against
        it. Raises Breach with the first."""
        said = tuple(sentence for sentences in breaches.values() for sentence in sentences)
        changes: dict[str, object] = {name: not sentences for name, sentences in breaches.items()}
        if first_gradients_finite is not None:
            changes["first_gradients_finite"] = first_gradients_finite
        changes["breaches"] = self._proof.breaches + said
        self._proof = self._proof.model_copy(update=changes)
        self.channel.section("proof", self._proof)
        if said:
            raise Breach(said[0] + (f" (and {len(said) - 1} more)" if len(said) > 1 else ""))
