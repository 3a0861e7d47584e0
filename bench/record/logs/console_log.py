"""Finds a Trainer's entries in text: what it printed between everything else, and JSON lines.

Entries are flat dictionaries in braces, printed by Python (``{'loss': 2.29, 'grad_norm': nan}``), by
transformers 5 with quoted numbers (``{'loss': '2.29'}``) or as JSON (LLaMA-Factory's ``trainer_log.jsonl``).
Nothing is evaluated: known keys are looked for, and the value behind each must be a number. Around them may
stand progress bars with carriage returns, colour codes, timestamps, anything. Lines are streamed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from bench.record.logs.logged_values import KNOWN_KEYS, LoggedWindow, number, shortened, window_of

_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_ENTRY = re.compile(r"\{[^{}]*\}")
_VALUE = re.compile(
    rf"""(?P<mark>['"])(?P<key>{"|".join(sorted(KNOWN_KEYS, key=len, reverse=True))})(?P=mark)\s*:\s*"""
    r"""(?:(?P<quote>['"])(?P<quoted>[^'"]{0,60})(?P=quote)"""
    # A number in the wrapping of its library: tensor(0.39, device='cuda:0'), np.float64(0.39).
    r"""|[A-Za-z_][\w.]{0,30}\(\s*(?P<wrapped>[^,()\s]{1,60})[^()]{0,80}\)"""
    r"""|(?P<bare>[^,{}()\s'"]{1,60}))"""
)
_BAR = re.compile(r"(?<![0-9])([0-9]{1,12})/([0-9]{1,12}) \[")
"""tqdm's count: " 25%|██▌   | 5/20 [00:00<00:00, 144.32it/s]"."""
_ACCUMULATION = re.compile(r"Gradient Accumulation steps = ([0-9]{1,6})")
_TOTAL = re.compile(r"Total optimization steps = ([0-9,]{1,15})")
"""Both are what ``Trainer.train`` logs at level info when it begins."""


@dataclass
class Findings:
    """What a text holds of a training."""

    windows: list[LoggedWindow] = field(default_factory=list)
    bars: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Place in ``windows`` -> count and total of the progress bar redrawn right after it."""
    counted: bool = False
    """An entry counted "current_steps", as LLaMA-Factory does."""
    accumulation: int | None = None
    max_steps: int | None = None
    train_loss: float | None = None
    train_loss_at: tuple[str, str] | None = None
    """Where and as what the final mean stands."""


def scan(lines: Iterable[str]) -> Findings:
    """Find entries in lines of text (without limit to their number; each is looked at once)."""
    found = Findings()
    for line_number, line in enumerate(lines, start=1):
        # A progress bar redraws itself behind carriage returns, on what is one line of the file.
        for piece in line.split("\r"):
            _scan_piece(found, _COLOURS.sub("", piece) if "\x1b" in piece else piece, line_number)
    return found


def _scan_piece(found: Findings, piece: str, line_number: int) -> None:
    if "loss" in piece:
        for match in _ENTRY.finditer(piece):
            _take_entry(found, match.group(), f"line {line_number}")
    last = len(found.windows) - 1
    if last >= 0 and last not in found.bars and (bar := _BAR.search(piece)):
        found.bars[last] = (int(bar[1]), int(bar[2]))
    if " steps = " in piece:
        if header := _ACCUMULATION.search(piece):
            found.accumulation = int(header[1]) or None
        if header := _TOTAL.search(piece):
            found.max_steps = int(header[1].replace(",", "") or 0) or None


def _take_entry(found: Findings, text: str, where: str) -> None:
    values = dict(_values(text))
    if (window := window_of(values, where, text)) is not None:
        found.windows.append(window)
        found.counted |= "current_steps" in values
    elif (train_loss := number(values.get("train_loss"))) is not None:
        found.train_loss, found.train_loss_at = train_loss, (where, shortened(text))


def _values(text: str) -> Iterator[tuple[str, object]]:
    for match in _VALUE.finditer(text):
        if match["quoted"] is not None:
            yield match["key"], match["quoted"]
        else:
            # Not a string: a number that Python or JSON printed whole, not one cut to four digits.
            token = match["wrapped"] or match["bare"]
            counts = match["key"] == "global_step/max_steps"
            yield match["key"], token if counts else number(token)


def with_counted_steps(windows: tuple[LoggedWindow, ...], found: Findings) -> tuple[LoggedWindow, ...]:
    """The windows with steps from the progress bars, where the log itself has none and the bars agree.

    Source: ``ProgressCallback`` counts the step before it writes the entry, and tqdm redraws the bar right
    after a write, so the first bar behind an entry shows its step. Where output was buffered or the bar
    belongs to something else this fails, so it is believed only if the steps are evenly spaced multiples
    of their distance, as ``logging_steps`` makes them.
    """
    if any(window.step is not None for window in windows) or not found.bars:
        return windows
    (total, _), *_ = Counter(total for _, total in found.bars.values()).most_common(1)
    offset = len(found.windows) - len(windows)
    steps = [
        bar[0] if (bar := found.bars.get(offset + place)) and bar[1] == total else None
        for place in range(len(windows))
    ]
    if len(steps) > 2 and steps[-1] is None and None not in steps[:-1]:
        # The log ends before the bar is redrawn.
        steps[-1] = 2 * (steps[-2] or 0) - (steps[-3] or 0)
    counted = [step for step in steps if step is not None]
    if len(counted) < len(steps) or not _evenly_spaced(counted):
        return windows
    return tuple(replace(window, step=step) for window, step in zip(windows, counted, strict=True))


def _evenly_spaced(steps: list[int]) -> bool:
    # logging_first_step=True adds an entry at step 1.
    regular = steps[1:] if len(steps) > 2 and steps[0] == 1 and steps[1] > 2 else steps
    distance = regular[1] - regular[0] if len(regular) > 1 else 0
    return distance > 0 and all(
        step == regular[0] + place * distance and step % distance == 0 for place, step in enumerate(regular)
    )
