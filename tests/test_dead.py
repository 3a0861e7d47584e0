"""What is looked at in few steps is what the definition says of all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.judge.dead import dead_tensors
from bench.judge.headroom import find_headroom
from bench.record.stability import StepProbe
from tests.record_factory import quantization, record, step

NAMES = ("a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B", "c.lora_A", "d.lora_B")
SIZES = st.sampled_from([None, 0.0, 1e-30, 1.0, float("nan"), float("inf")])


def seen(norms, zeros=None, **layers):
    return StepProbe(
        **({"activation_abs_max": (1.0,), "gradient_abs_max": (1.0,)} | layers),
        tensor_norms=tuple(norms),
        non_finite_values=(0,) * len(norms),
        zero_values=tuple(zeros if zeros is not None else (4 if norm == 0 else 0 for norm in norms)),
    )


@st.composite
def runs(draw):
    count = draw(st.integers(1, 6))
    warm = draw(st.integers(0, count - 1))
    steps = [
        step(
            index,
            warmup=index < warm,
            applied=draw(st.booleans()),
            probe=draw(
                st.none()
                | st.builds(
                    seen,
                    st.lists(SIZES, min_size=draw(st.sampled_from([4, 6])), max_size=6),
                    st.none() | st.lists(st.sampled_from([None, 0, 4]), min_size=6, max_size=6),
                )
            ),
        )
        for index in range(count)
    ]
    order = draw(st.permutations(steps))
    made = record("hqq", steps=tuple(order))
    return made.model_copy(update={"lora": made.lora.model_copy(update={"names": NAMES})})


def by_definition(made):
    """Every tensor in every step."""
    probed = [one for one in made.steps if one.probe is not None]
    measured = [one for one in probed if not one.warmup]
    if not measured:
        return None

    def at(one, place):
        norms, zeros = one.probe.tensor_norms, one.probe.zero_values
        return (norms[place], zeros[place] if place < len(zeros) else None) if place < len(norms) else (None, None)

    found = []
    for place, name in enumerate(NAMES):
        deciding = measured
        if name.endswith("_A"):
            partner = NAMES.index(name[:-1] + "B") if name[:-1] + "B" in NAMES else None
            moved = [] if partner is None else [one.index for one in probed if one.applied and at(one, partner)[0] not in (None, 0)]
            deciding = [one for one in measured if moved and one.index > moved[0]]
        if deciding and all(at(one, place)[0] == 0 and at(one, place)[1] != 0 for one in deciding):
            found.append(name)
    return tuple(found)


@given(made=runs())
def test_dead_tensors_are_those_without_a_gradient_in_every_step_that_counts(made):
    assert dead_tensors(made) == by_definition(made)


@given(grids=st.lists(st.tuples(*[st.lists(SIZES, min_size=3, max_size=3)] * 2), min_size=1, max_size=5))
def test_the_lowest_headroom_is_the_first_of_the_lowest_cells(grids):
    probes = [seen((), activation_abs_max=forward, gradient_abs_max=backward) for forward, backward in grids]
    made = record(
        "hqq",
        quantization=quantization("hqq", effective_dtype="float16"),
        steps=tuple(step(index, probe=one) for index, one in enumerate(probes)),
    )
    found = find_headroom(made)
    known = [place for place in found.places() if place.cell.bits is not None]
    assert found.lowest == min(known, key=lambda place: place.cell.bits, default=None)
