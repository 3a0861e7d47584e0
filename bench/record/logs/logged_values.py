"""One window of a training log that another program wrote, and how its numbers are read.

A Trainer logs once in ``logging_steps`` optimizer steps; what it logs then speaks of all steps since the
last entry, so an entry is called a window here. ``window_of`` makes one from the keys and values of an
entry, whatever the program that wrote it called them. Used by ``bench.record.logs.training_log``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

STEP_KEYS = ("step", "current_steps", "global_step", "global_step/max_steps")
"""transformers, LLaMA-Factory, others, ms-swift ("12/100")."""
RATE_KEYS = ("learning_rate", "lr")
KNOWN_KEYS = ("loss", "grad_norm", "epoch", "train_loss", *RATE_KEYS, *STEP_KEYS)

LONGEST_TEXT = 300
"""Characters of an entry that are kept as evidence."""
LOSS_DECIMALS = 4
EPOCH_DECIMALS = 2
"""To which transformers 4 rounded."""
LARGEST_STEP = 10**12
"""Beyond this a step count is a damaged number."""

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][-+]?[0-9]{1,5})?")
_WORDS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}


@dataclass(frozen=True, slots=True)
class LoggedWindow:
    """What a Trainer logged of the optimizer steps since its last entry."""

    where: str
    """Place in the file, as a person finds it: "line 12", "log_history[3]"."""
    text: str
    """The entry as it stands there, cut to LONGEST_TEXT characters."""
    step: int | None
    """Optimizer steps done when it was logged."""
    loss: float
    """Mean over the window's steps, after what the Trainer did to it. May be NaN or infinite."""
    loss_rounding: float
    """The logged loss differs from the computed one by at most this."""
    gradient_norm: float | None
    """L2 norm of the window's last step, before clipping. None: the log does not have it."""
    learning_rate: float | None
    epoch: float | None
    epoch_rounding: float = 0.0
    """As ``loss_rounding``."""


def window_of(values: Mapping[str, object], where: str, text: str) -> LoggedWindow | None:
    """The window that an entry speaks of, or None for an entry without a training loss (an evaluation)."""
    loss = number(values.get("loss"))
    if loss is None:
        return None
    epoch = _finite(number(values.get("epoch")))
    return LoggedWindow(
        where=where,
        text=shortened(text),
        step=next((step for key in STEP_KEYS if (step := _step(values.get(key))) is not None), None),
        loss=loss,
        loss_rounding=_rounding(loss, LOSS_DECIMALS, quoted=isinstance(values["loss"], str)),
        gradient_norm=number(values.get("grad_norm")),
        learning_rate=next(
            (rate for key in RATE_KEYS if (rate := number(values.get(key))) is not None), None
        ),
        epoch=epoch,
        epoch_rounding=_rounding(epoch or 0.0, EPOCH_DECIMALS, quoted=isinstance(values.get("epoch"), str)),
    )


def number(value: object) -> float | None:
    """A logged value as a number; None for what is absent or no number. Reads "nan", "2.29", "-Infinity"."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return None
    if not isinstance(value, str):
        return None
    word = value.strip()
    if _NUMBER.fullmatch(word):
        return float(word)
    found = _WORDS.get(word.lstrip("+-").casefold())
    return None if found is None else -found if word.startswith("-") else found


def shortened(text: str) -> str:
    """An entry on one line, cut to LONGEST_TEXT characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT - 3]}..."


def _rounding(value: float, decimals: int, *, quoted: bool) -> float:
    """Half a unit of the last digit that was kept.

    Source: transformers 5 prints quoted strings of four significant digits (``f"{v:.4g}"``,
    trainer_callback.py) and stores all digits. transformers 4 rounded a loss to four decimals before it
    printed or stored it (``Trainer._maybe_log_save_evaluate``), and an epoch to two when it printed it.
    """
    if not math.isfinite(value):
        return 0.0
    if quoted:
        return 0.5 * 10.0 ** (math.floor(math.log10(abs(value))) - 3) if value else 0.0
    return 0.5 * 10.0**-decimals if round(value, decimals) == value else 0.0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _step(value: object) -> int | None:
    found = number(value.partition("/")[0] if isinstance(value, str) else value)
    if found is None or not 0 <= found <= LARGEST_STEP or found != int(found):
        return None
    return int(found)
