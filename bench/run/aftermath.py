"""After the training: the comparison with the unquantized reference, and the replay of what failed.

Nothing here is part of any measured step, and nothing that goes wrong here can lose what was measured: it
becomes a note in the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.ask.experiment import Dtype
from bench.load.contract import PackedBackend
from bench.record.stability import Fidelity, Remedy, Replay
from bench.run.fidelity import compare_gradients, weight_errors
from bench.run.replay import REPLAYABLE, Replayer, refined
from bench.run.training import Trainer

if TYPE_CHECKING:
    from bench.run.building import Builder
    from bench.run.loading import Loaded
    from bench.run.telling import Telling


SCALES_MOVED = (
    "the calibration moved scales between weights and norms: no weight has a dense counterpart, and adapters "
    "behind a rescaled norm have other gradients, which the cosine counts as error"
)


class Aftermath:
    """What is looked into once the steps are done. Holds the model, and lets it go for the last remedy."""

    def __init__(self, builder: Builder, telling: Telling, loaded: Loaded, trainer: Trainer) -> None:
        self._builder = builder
        self._telling = telling
        self._loaded: Loaded | None = loaded
        self._trainer: Trainer | None = trainer
        self._watch, self._linears = trainer.watch, list(loaded.built.layers)
        self._lora = trainer.request.lora
        trainer.watch = None

    def compare_with_reference(self) -> None:
        """Tell the fidelity, or why there is none."""
        order = self._builder.order
        if not order.request.fidelity:
            return
        self._telling.channel.stage("compare")
        try:
            fidelity = self._fidelity()
        except Exception as error:  # noqa: BLE001 - the training's own result stands
            fidelity = Fidelity(note=f"the comparison failed: {type(error).__name__}: {error}"[:500])
        self._telling.channel.section("fidelity", fidelity)

    def _fidelity(self) -> Fidelity:
        builder, loaded, trainer = self._builder, self._loaded, self._trainer
        assert loaded is not None
        assert trainer is not None
        order = builder.order
        if order.reference_file is None or not order.reference_file.is_file():
            return Fidelity(note=order.reference_note or "the reference could not be made")
        batch = builder.reader().next_batch()
        fidelity = compare_gradients(trainer, batch, order.reference_file)
        backend = loaded.backend
        moved = isinstance(backend, PackedBackend) and backend.calibration_moves_scales
        if moved and order.request.calibration == "calibrated":
            return fidelity.model_copy(update={"note": SCALES_MOVED})
        _, _, dense = builder.open(builder.request, order.model_folder)
        errors = weight_errors(loaded.built, loaded.shapes, dense, trainer.dtype)
        return fidelity.model_copy(update={"weight_errors": errors})

    def investigate(self) -> None:
        """Replay the first failure, unless the scaler dealt with it. What goes wrong is told as far as the
        replay came."""
        replay = Replay(reproduced=False)
        try:
            for replay in self._replayed():
                self._tell(replay)
        except Exception as error:  # noqa: BLE001 - a card that failed meanwhile; the training's result stands
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            self._tell(replay.model_copy(update={"error": text}))

    def _replayed(self) -> Iterator[Replay]:
        """The replay, and again after each remedy."""
        watch = self._watch
        failure = watch.finder.found if watch else None
        snapshot = watch.snapshot if watch else None
        wanted = self._builder.order.replay and failure is not None and failure.kind in REPLAYABLE
        if not wanted or failure is None or snapshot is None or self._trainer is None:
            return
        if failure.skipped_by_scaler and self._trained_since():
            return
        self._telling.channel.stage("replay")
        replayer = Replayer(self._trainer, self._linears, failure, snapshot)
        replay = replayer.watched()
        self._telling.failure(refined(failure, replay))
        yield replay
        for remedy in self._remedies(replayer):
            replay = replay.model_copy(update={"remedies": (*replay.remedies, remedy())})
            yield replay

    def _remedies(self, replayer: Replayer) -> list[Callable[[], Remedy]]:
        remedies = [replayer.attention]
        if self._lora.precision != "float32":
            remedies.append(replayer.float32_adapters)

        def another_dtype() -> Remedy:
            self._loaded = self._trainer = None  # the failing model must be gone before the next one comes
            return replayer.another_dtype(self._rebuild)

        return [*remedies, another_dtype]

    def _rebuild(self, dtype: Dtype) -> Trainer:
        request = self._builder.request.model_copy(update={"dtype": dtype})
        return self._builder.trainer_of(request)

    def _trained_since(self) -> bool:
        """Whether any update was applied in spite of the scaler's skips."""
        return bool(self._trainer and self._trainer.optimizer.state)

    def _tell(self, replay: Replay) -> None:
        self._telling.channel.section("replay", replay)
