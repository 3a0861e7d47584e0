"""Which model each backend of a sweep loads: the one that was asked for, or a packed checkpoint of it.

GPTQ and AWQ read checkpoints that are quantized already. A preset can name those that its publisher has made
(``[published]``); they are other files than the dense model's, with a fingerprint and sometimes shapes of
their own, so the runs of one sweep can have different models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.ask.experiment import Experiment
from bench.ask.models import ResolvedModel, find_on_disk, resolve_model
from bench.ask.packing import Calibration, Method, decide_calibration
from bench.ask.plan import RunRequest
from bench.ask.preset import Preset
from bench.ask.versions import CURRENT, HARNESS_LIBRARIES, installed_versions
from bench.errors import BadValue
from bench.load.contract import PackedBackend
from bench.load.registry import Entry


@dataclass(frozen=True)
class Source:
    """Where the runs of one backend have their model from."""

    model: ResolvedModel
    calibration: Method | None
    """How the packed checkpoint comes to be; None: the backend quantizes on load."""
    note: str | None = None
    """A departure from what was asked that concerns the packed checkpoint."""
    obstacle: str | None = None
    """Why nothing can be run from it."""


def find_sources(
    experiment: Experiment,
    preset: Preset,
    entries: Mapping[str, Entry],
    calibration: Calibration,
    *,
    download: bool,
) -> dict[str, Source]:
    """The source of every backend of ``experiment``, by backend id.

    ``auto`` prefers what is published. Where only the dense weights are on this disk, a model that is also
    published packed is neither calibrated nor rounded unasked, which would take hours at 145 GB: those runs
    have an obstacle. ``download``: the person has agreed to fetch from the Hub; only what some backend reads
    is fetched. Raises MissingModel, BrokenFile or BadValue.
    """
    finder = _Finder(experiment, preset, calibration, download)
    found = {name: finder.source(entries[name]) for name in experiment.backends}
    obstacles = [source.obstacle for source in found.values()]
    able = [name for name, entry in entries.items() if finder.can_read(entry)]
    if all(obstacles) and not set(able) & set(found):
        raise BadValue(str(obstacles[0]), f"possible with: {', '.join(able)}" if able else None)
    return found


@dataclass
class _Finder:
    experiment: Experiment
    preset: Preset
    calibration: Calibration
    download: bool
    _known: dict[str | None, ResolvedModel] = field(default_factory=dict)

    def source(self, entry: Entry) -> Source:
        """The source of one backend."""
        published = self._published(entry)
        if published is None:
            return self._asked(entry)
        if self.download or find_on_disk(published) is not None:
            return Source(self._model(published), "published")
        absent = f"the published checkpoint '{published}' is not on this disk"
        if find_on_disk(str(self.preset.model)) is not None:
            # Its own command says nothing about the calibration, so that it is decided anew.
            return Source(
                self._model(),
                "published",
                obstacle=f"{absent}, and the dense weights that are there are not calibrated unasked; fetch "
                "it with --download, or have them rounded with --calibration rtn",
            )
        if self.experiment.weights == "real":
            return Source(self._model(published), "published")  # which says that it is missing
        source = self._asked(entry)
        note = f"{absent}; {source.note}" if source.note else absent
        return Source(source.model, source.calibration, note)

    def can_read(self, entry: Entry) -> bool:
        """Whether the model that was asked for is dense, or packed as this backend reads it."""
        return self._known.get(None) is None or _mismatch(self._known[None], entry) is None

    def _published(self, entry: Entry) -> str | None:
        """The published checkpoint that stands for the preset's own model in this backend."""
        own = self.experiment.model in (None, self.preset.model)
        if not (own and self.calibration == "auto" and self.experiment.weights != "synthetic"):
            return None
        return self.preset.published.get(entry.backend.method) if _packed(entry) else None  # type: ignore[attr-defined]

    def _asked(self, entry: Entry) -> Source:
        """The model that was asked for, quantized on load or packed for this backend."""
        model = self._model()
        mismatch = _mismatch(model, entry)
        if not _packed(entry):
            return Source(model, None, obstacle=mismatch)
        method, note = decide_calibration(model.request, self.calibration, self.preset.calibration)
        return Source(model, method, note, mismatch)

    def _model(self, published: str | None = None) -> ResolvedModel:
        """The model that was asked for, or one that is published packed; each is looked up once."""
        if published not in self._known:
            experiment = self.experiment
            if published is not None:
                experiment = experiment.model_copy(update={"model": published, "weights": "real"})
            self._known[published] = resolve_model(
                experiment, preset_model=self.preset.model, download=self.download
            )
        return self._known[published]


def packing_request(request: RunRequest, entries: Mapping[str, Entry]) -> RunRequest:
    """The run that makes the packed checkpoint of ``request``: itself, or that of the backend whose
    checkpoints its own reads, with the options that both have."""
    kind = entries[request.backend].backend
    maker = kind.checkpoint_of if issubclass(kind, PackedBackend) else None
    if maker is None or request.calibration not in ("rtn", "calibrated"):
        return request
    entry = entries[maker]
    shared = {n: value for n, value in request.options.items() if n in type(entry.defaults).model_fields}
    return request.model_copy(
        update={
            "backend": maker,
            "environment": CURRENT,
            "options": entry.options(shared).model_dump(mode="json"),
            "versions": installed_versions([*HARNESS_LIBRARIES, *entry.distributions]),
        }
    )


def _packed(entry: Entry) -> bool:
    return issubclass(entry.backend, PackedBackend)


def _mismatch(model: ResolvedModel, entry: Entry) -> str | None:
    """Why a backend cannot read a checkpoint that is quantized already."""
    config = model.request.architecture.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    what = f"'{model.request.name}' is quantized already" + (f" ({method})" if method else "")
    if not issubclass(entry.backend, PackedBackend):
        return f"{what}, and '{entry.id}' quantizes dense weights"
    if method is not None and method != entry.backend.method:
        return f"{what}, and '{entry.id}' reads {entry.backend.method} checkpoints"
    return None
