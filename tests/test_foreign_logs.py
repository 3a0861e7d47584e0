import gzip
import json
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import BrokenFile, UserError
from bench.judge.logs.diagnosis import diagnose
from bench.record.logs.training_log import LARGEST_DOCUMENT_BYTES, LOOKED_AT, read_training_log
from bench.show.diagnosis import diagnosis_document, diagnosis_text

CONSOLE_4 = """\
{'loss': 2.29, 'grad_norm': 0.39, 'learning_rate': 1e-05, 'epoch': 0.1}
{'loss': 5661.4512, 'grad_norm': nan, 'learning_rate': 9.5e-06, 'epoch': 0.2}
{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 9e-06, 'epoch': 0.3}
{'train_runtime': 12.3, 'train_samples_per_second': 1.0, 'train_loss': 1887.9, 'epoch': 0.3}
"""
STATE = {
    "epoch": 0.3,
    "global_step": 30,
    "logging_steps": 10,
    "max_steps": 100,
    "log_history": [
        {"epoch": 0.1, "grad_norm": 0.39, "learning_rate": 1e-05, "loss": 2.29, "step": 10},
        {"epoch": 0.1, "eval_loss": 2.3, "eval_runtime": 1.0, "step": 10},
        {"epoch": 0.2, "grad_norm": math.nan, "learning_rate": 9.5e-06, "loss": 5661.4512, "step": 20},
        {"epoch": 0.3, "grad_norm": math.nan, "learning_rate": 9e-06, "loss": 0.0, "step": 30},
        {"epoch": 0.3, "train_loss": 1887.9, "step": 30},
    ],
}
LLAMA_FACTORY = """\
{"current_steps": 10, "total_steps": 100, "loss": 2.29, "lr": 1e-05, "epoch": 0.1, "percentage": 10.0, "elapsed_time": "0:00:10"}
{"current_steps": 10, "total_steps": 100, "eval_loss": 2.3, "epoch": 0.1, "percentage": 10.0}
{"current_steps": 20, "total_steps": 100, "loss": 5661.4512, "lr": 9.5e-06, "epoch": 0.2, "percentage": 20.0}
{"current_steps": 30, "total_steps": 100, "loss": 0.0, "lr": 9e-06, "epoch": 0.3, "percentage": 30.0}
"""


@pytest.fixture
def read(tmp_path):
    """Reads text or bytes as if they were a file."""

    def reader(content, name="log"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_training_log(path)

    return reader


def numbers(log):
    return [(w.loss, w.gradient_norm, w.learning_rate, w.epoch) for w in log.windows]


@pytest.mark.parametrize(
    ("content", "kind", "steps", "places"),
    [
        (CONSOLE_4, "console", [None, None, None], ["line 1", "line 2", "line 3"]),
        (json.dumps(STATE, indent=2), "trainer_state", [10, 20, 30], ["log_history[0]", "log_history[2]", "log_history[3]"]),
        (json.dumps(STATE), "trainer_state", [10, 20, 30], ["log_history[0]", "log_history[2]", "log_history[3]"]),
        (json.dumps(STATE["log_history"]), "trainer_state", [10, 20, 30], ["log_history[0]", "log_history[2]", "log_history[3]"]),
        (LLAMA_FACTORY, "llama_factory", [10, 20, 30], ["line 1", "line 3", "line 4"]),
    ],
    ids=["console", "state", "state in one line", "bare history", "llama factory"],
)  # fmt: skip
def test_the_three_formats_say_the_same(read, content, kind, steps, places):
    log = read(content)
    assert log.kind == kind
    assert [w.loss for w in log.windows] == [2.29, 5661.4512, 0.0]
    assert [w.learning_rate for w in log.windows] == [1e-05, 9.5e-06, 9e-06]
    assert [w.epoch for w in log.windows] == [0.1, 0.2, 0.3]
    assert [w.step for w in log.windows] == steps
    assert [w.where for w in log.windows] == places
    norms = [w.gradient_norm for w in log.windows]
    assert norms == (
        [None] * 3 if kind == "llama_factory" else pytest.approx([0.39, math.nan, math.nan], nan_ok=True)
    )


def test_a_state_tells_its_settings_and_the_final_mean(read):
    log = read(json.dumps(STATE))
    assert (log.logging_steps, log.max_steps, log.train_loss) == (10, 100, 1887.9)
    assert log.train_loss_at[0] == "log_history[4]"
    assert read(CONSOLE_4).train_loss_at[0] == "line 4"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{'loss': '2.29', 'grad_norm': 'nan', 'learning_rate': '1e-05', 'epoch': '0.1'}", (2.29, math.nan, 1e-05, 0.1)),
        ("{'loss': 2.29, 'grad_norm': inf, 'learning_rate': 0.0, 'epoch': 1.0}", (2.29, math.inf, 0.0, 1.0)),
        ("{'loss': -inf, 'grad_norm': -1.5e+3, 'learning_rate': 0, 'epoch': 1}", (-math.inf, -1500.0, 0.0, 1.0)),
        ('{"loss": NaN, "grad_norm": Infinity, "lr": null, "epoch": 1}', (math.nan, math.inf, None, 1.0)),
        ("{'loss': np.float64(2.29), 'grad_norm': tensor(0.39, device='cuda:0'), 'epoch': 1}", (2.29, 0.39, None, 1.0)),
        ("2024-09-14 10:00:00,123 - INFO - {'loss': 2.29, 'epoch': 0.1} trailing", (2.29, None, None, 0.1)),
        ("\x1b[32m{'loss': 2.29, \x1b[0m'grad_norm': 0.39}\x1b[0m", (2.29, 0.39, None, None)),
        ("100%|██████████| 5/20 [00:00<00:00, 144.32it/s]\r      \r{'loss': 2.29, 'epoch': 0.1}\r\n", (2.29, None, None, 0.1)),
        ("(Worker pid=1) {'loss': 2.29, 'rewards/chosen': 1.0, 'epoch': 0.1}", (2.29, None, None, 0.1)),
        ("{'note': 'x', 'loss': 2.29}{'other': {'loss': 3}}", (2.29, None, None, None)),
    ],
)  # fmt: skip
def test_an_entry_is_found_in_whatever_form_it_was_printed(read, line, expected):
    log = read(f"Loading checkpoint shards: 100%\n\n{line}\n{{'eval_loss': 1.0}}\n")
    assert numbers(log)[0] == pytest.approx(expected, nan_ok=True)
    assert log.windows[0].where == "line 3"
    assert "\r" not in log.windows[0].text


@pytest.mark.parametrize(
    "line",
    [
        "{'loss': __import__('os').system('true')}",
        "{'loss': '1_000'}",
        "{'loss': True}",
        "{'loss': 0x10}",
        "{'loss': '\u0661'}",
        "{'loss': [1.0]}",
        "{'loss': }",
        "{'loss': 'high'}",
        "{'eval_loss': 2.0}",
        "{'train_loss': 2.0}",
        "'loss': 2.0",
        "{'loss': 2.0",
    ],
)
def test_what_is_no_number_is_no_loss(read, line):
    with pytest.raises(BrokenFile, match="holds no training loss"):
        read(line)


def test_a_wrapped_step_count_and_a_swift_one_are_read(read):
    log = read('{"loss": 2.0, "global_step/max_steps": "12/100"}\n{"loss": 2.0, "global_step": 13}\n')
    assert [w.step for w in log.windows] == [12, 13]


def test_the_header_of_a_training_tells_accumulation_and_length(read):
    header = (
        "[INFO|trainer.py:2134] >>   Gradient Accumulation steps = 8\n  Total optimization steps = 1,250\n"
    )
    log = read(header + CONSOLE_4)
    assert (log.accumulation, log.max_steps) == (8, 1250)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_and_line_ends_of_other_systems_are_read(read, encoding, newline):
    log = read(CONSOLE_4.replace("\n", newline).encode(encoding))
    assert [w.loss for w in log.windows] == [2.29, 5661.4512, 0.0]
    assert [w.where for w in log.windows] == ["line 1", "line 2", "line 3"]


def test_bytes_that_are_no_text_between_entries_are_passed_over(read):
    assert len(read(b"\xff\xfd\x80 noise\n" + CONSOLE_4.encode() + b"\xc3").windows) == 3


def with_bars(counts, total=50):
    lines = [
        f"{{'loss': '2.{i}', 'epoch': '0.{i}'}}\n\r  4%|█ | {n}/{total} [00:00<00:01, 9.9it/s]\r   \r"
        for i, n in enumerate(counts)
    ]
    return "".join(lines)


def test_progress_bars_tell_the_steps(read):
    assert [w.step for w in read(with_bars([10, 20, 30])).windows] == [10, 20, 30]
    assert [w.step for w in read(with_bars([1, 10, 20])).windows] == [1, 10, 20]


@pytest.mark.parametrize("counts", [[11, 21, 31], [10, 20, 40], [10, 10, 10], [30, 20, 10], [50, 50, 50]])
def test_progress_bars_that_do_not_fit_an_even_logging_are_not_believed(read, counts):
    assert [w.step for w in read(with_bars(counts)).windows] == [None] * 3


def test_a_bar_that_was_not_redrawn_at_the_end_is_supplied(read):
    text = with_bars([10, 20]) + "{'loss': '2.5', 'epoch': '0.5'}\n"
    assert [w.step for w in read(text).windows] == [10, 20, 30]


def test_buffered_output_without_its_bars_has_no_steps(read):
    text = "".join(f"\r{n}/30 [00:00<00:01]" for n in range(1, 31)) + "\n" + CONSOLE_4
    assert [w.step for w in read(text).windows] == [None] * 3


@pytest.mark.parametrize("again", [LLAMA_FACTORY, CONSOLE_4])
def test_of_several_runs_the_last_is_read_and_said_so(read, again):
    log = read(again + again)
    assert len(log.windows) == 3
    assert "2 runs" in log.notes[0]
    assert log.windows[0].where == f"line {again.count(chr(10)) + 1}"


@pytest.mark.parametrize(
    ("text", "rounding"),
    [
        ("{'loss': '2.29'}", 5e-4),
        ("{'loss': '3.441e+05'}", 50),
        ("{'loss': '0.01234'}", 5e-6),
        ("{'loss': '0'}", 0),
        ("{'loss': 2.29}", 5e-5),
        ("{'loss': 0.0}", 5e-5),
        ("{'loss': 2.2900123}", 0),
        ("{'loss': nan}", 0),
    ],
)
def test_how_far_a_logged_loss_was_rounded_is_known(read, text, rounding):
    assert read(text).windows[0].loss_rounding == pytest.approx(rounding)


# ---- what is no log --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\0\0\0", "is a binary file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is a binary file"),
        (gzip.compress(CONSOLE_4.encode() * 9), "is a binary file"),
        (b"just some text\n", "holds no training loss"),
        (b'{"train_loss": 2.0, "epoch": 1.0}', "holds no training loss"),
        (b'{"a": 1}\n{"a": 2}\n', "holds no training loss"),
        (b'{"log_history": []}', "holds no training loss"),
        (b"[]", "holds no training loss"),
        (b'{"log_history": 3}', "log_history is no list"),
        (b'{"log_history": [1]}', r"log_history\[0\] is no entry"),
        (b"[[1]]", r"log_history\[0\] is no entry"),
        (
            json.dumps(STATE, indent=2).encode()[:300],
            r"not valid JSON .* at line \d+, column \d+\): cut short",
        ),
        (b'{"log_history": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"log_history": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
    ],
    ids=range(18),
)
def test_what_is_no_log_is_refused_in_one_line(read, content, words):
    with pytest.raises(BrokenFile, match=words) as caught:
        read(content)
    assert "\n" not in str(caught.value)
    assert "log" in str(caught.value)


def test_a_folder_a_missing_file_and_a_device_are_refused(tmp_path):
    with pytest.raises(BrokenFile, match="is a folder"):
        read_training_log(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(BrokenFile, match=r"did you mean '.*trainer_state\.json'"):
        read_training_log(tmp_path)
    with pytest.raises(BrokenFile, match="cannot be read: No such file"):
        read_training_log(tmp_path / "none")
    with pytest.raises(BrokenFile, match="cannot be read"):
        read_training_log(tmp_path / ("x" * 300))
    with pytest.raises(BrokenFile, match="is no file name"):
        read_training_log(tmp_path / "a\0b")
    with pytest.raises(BrokenFile, match="is not a file"):
        read_training_log(type(tmp_path)("/dev/zero"))


def test_a_state_too_large_to_parse_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "trainer_state.json"
    with path.open("wb") as file:
        file.write(b'{"log_history": [' + b" " * LOOKED_AT)
        file.truncate(LARGEST_DOCUMENT_BYTES + 1)
    with pytest.raises(BrokenFile, match="larger than 256 MiB"):
        read_training_log(path)


def test_a_cut_off_line_costs_only_itself(read):
    log = read(LLAMA_FACTORY[:-20])
    assert [w.step for w in log.windows] == [10, 20]


@pytest.mark.parametrize(
    "filler", ["{" * 300_000, "9" * 300_000, "'loss': " * 40_000, "{'loss':" * 40_000, "\x1b[" * 150_000]
)
def test_hostile_lines_take_no_more_than_linear_time(read, filler):
    begun = time.perf_counter()
    log = read(f"{filler}\n{CONSOLE_4}")
    assert len(log.windows) == 3
    assert time.perf_counter() - begun < 5


def test_a_log_of_a_hundred_megabytes_is_read(tmp_path):
    bars = "".join(f"\r {n}%|██▌       | {n}/100 [00:00<00:00, 144.32it/s]" for n in range(100))
    path = tmp_path / "console.log"
    with path.open("w", encoding="utf-8") as file:
        for n in range(20_000):
            file.write(
                f"{bars}\n{{'loss': 2.29, 'grad_norm': 0.39, 'learning_rate': 1e-05, 'epoch': {n / 100}}}\n"
            )
    assert path.stat().st_size > 100e6
    assert len(read_training_log(path).windows) == 20_000


# ---- anything at all -------------------------------------------------------------------------------

SEEDS = (
    CONSOLE_4,
    json.dumps(STATE, indent=2),
    LLAMA_FACTORY,
    with_bars([10, 20, 30]),
    json.dumps(STATE["log_history"]),
)
TOKENS = ("nan", "NaN", "inf", "-Infinity", "1e999", "-1", "1e308", "1e-320", "0", "null", "true", '"', "'", "{", "}", "[", "]", ",", ":",
          "\0", "\r", "\n", "\x1b[1m", "10**9", "9" * 400, "\ud7ff", "loss", "step", "log_history", "5/9 [0")  # fmt: skip


OPTIONS = (
    {},
    {"accumulation": 4},
    {"logging_steps": 10, "accumulation": 8},
    {"accumulation": 2, "finite_loss": 2.0},
)


def everything(path, options):
    """Read, diagnose, and say it: only a UserError may come of it."""
    try:
        found = diagnose(read_training_log(path), **options)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(diagnosis_document(found), allow_nan=False)
        assert diagnosis_text(found)


def mutated(text, draw):
    """A text with some of it deleted, doubled, swapped or replaced by what parsers dislike."""
    for _ in range(draw.randint(1, 6)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((0, 1, 2, 5, 40)))
        piece = draw.choice(("", text[start:end] * 2, draw.choice(TOKENS), str(draw.uniform(-1e6, 1e6))))
        text = text[:start] + piece + text[end:]
    return text if draw.random() < 0.9 else text[: draw.randrange(len(text) + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_no_mutation_of_a_log_raises_anything_but_a_user_error(tmp_path, seed):
    draw = random.Random(seed)
    path = tmp_path / "log"
    for _ in range(1000):
        path.write_bytes(mutated(SEEDS[seed], draw).encode("utf-8", "surrogatepass"))
        everything(path, draw.choice(OPTIONS))


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_but_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    everything(path, {})


VALUES = st.one_of(
    st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.sampled_from(["nan", "2.29", "Infinity", "1e400", 10**400, 0, 0.0, 1e-310, 1e300]),
)  # fmt: skip
ENTRIES = st.dictionaries(
    st.sampled_from(
        ["loss", "grad_norm", "learning_rate", "lr", "epoch", "step", "current_steps", "train_loss"]
    ),
    VALUES,
)


@given(st.lists(ENTRIES, max_size=12), VALUES, VALUES, st.sampled_from(OPTIONS))
@settings(max_examples=300, deadline=None)
def test_no_values_in_a_state_raise_anything_but_a_user_error(
    tmp_path_factory, entries, logging_steps, max_steps, options
):
    path = tmp_path_factory.getbasetemp() / "state.json"
    path.write_text(
        json.dumps({"log_history": entries, "logging_steps": logging_steps, "max_steps": max_steps})
    )
    everything(path, options)
