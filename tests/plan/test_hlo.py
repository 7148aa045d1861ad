# SPDX-License-Identifier: Apache-2.0
"""The reader of compiled programs: its grammar, loops and what it refuses."""

import jax
import jax.numpy as jnp
import pytest

from m2jax.plan import hlo, loops

LOOP = """\
HloModule toy, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (state: (s32[], s32[], f32[8,4])) -> pred[] {
  %state = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] get-tuple-element(%state), index=1
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%inner_body (state.1: (s32[], s32[], f32[8,4])) -> (s32[], s32[], f32[8,4]) {
  %state.1 = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %one = s32[] constant(1)
  %up = s32[] add(%j, %one)
  %kept = s32[] get-tuple-element(%state.1), index=1
  %x = f32[8,4]{1,0} get-tuple-element(%state.1), index=2
  %kernel = f32[8,4]{1,0} custom-call(%x), custom_call_target="kernel", \
backend_config={"body":"}{ ) (", "estimated_cycles":"7"}
  ROOT %next = (s32[], s32[], f32[8,4]{1,0}) tuple(%up, %kept, %kernel)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %zero = s32[] constant(0)
  %six = s32[] constant(6)
  %copied = s32[]{:T(128)} copy(%six)
  %start = (s32[], s32[], f32[8,4]{1,0}) tuple(%zero, %copied, %p)
  %loop = (s32[], /*index=1*/s32[], f32[8,4]{1,0}) while(%start), condition=%inner_condition, \
body=%inner_body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_a_bound_that_the_loop_carries_is_found() -> None:
    times = {v.instruction.name: v.times for v in loops.walk(hlo.parse(LOOP))}
    assert times["kernel"] == 6
    assert times["less"] == 7
    assert times["out"] == 1
    assert loops.trip_counts(hlo.parse(LOOP)) == {"loop": 6}


@pytest.mark.parametrize(("step", "times"), [(1, 6), (2, 3), (4, 2), (6, 1), (7, 1)])
def test_a_counter_may_go_up_by_more_than_one(step: int, times: int) -> None:
    """The partitioner unrolls the loops it makes of a product over a ring of devices, twice."""
    text = LOOP.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
    assert loops.trip_counts(hlo.parse(text)) == {"loop": times}


def test_payloads_do_not_end_a_computation() -> None:
    """A kernel's payload may hold braces and parentheses; a naive reader stops inside it."""
    module = hlo.parse(LOOP)
    kernel = module.computations["inner_body"].instructions["kernel"]
    assert kernel.cycles == 7
    assert kernel.opcode == "custom-call"
    assert module.entry == "main"


def test_arrays_and_where_they_lie() -> None:
    place = hlo.parse(LOOP).computations["main"].instructions["p"]
    assert place.arrays == (hlo.Array("f32", (8, 4), True),)
    assert (place.bytes, place.main_bytes) == (128, 0)
    both = hlo.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/pred[], s4[7]{0})")
    assert [(a.dtype, a.shape, a.bytes) for a in both] == [
        ("bf16", (2, 3), 12),
        ("pred", (), 1),
        ("s4", (7,), 3),
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("direction=LT", "direction=NE", "number of iterations"),
        ("constant(6)", "custom-call(%p)", "no constant"),
        ("constant(1)", "constant(0)", "number of iterations"),  # never ends
        ("tuple(%up, %kept,", "tuple(%up, %up,", "number of iterations"),  # the bound moves
        ("ENTRY %main", "%main", "no ENTRY"),
        ("%zero = s32[] constant(0)", "%zero : constant", "not an instruction"),
        ("f32[8,4]{1,0:T(8,128)S(1)} parameter", "f99[8,4] parameter", "unknown element type"),
    ],
)
def test_what_is_not_understood_is_refused(old: str, new: str, words: str) -> None:
    assert old in LOOP
    with pytest.raises(hlo.HloError, match=words):
        list(loops.walk(hlo.parse(LOOP.replace(old, new))))


def test_known_trip_counts_come_first() -> None:
    known = LOOP.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}'
    )
    assert loops.trip_counts(hlo.parse(known)) == {"loop": 3}


@pytest.mark.parametrize(("outer", "inner"), [(5, 1), (3, 4), (1, 7)])
def test_nested_scans_of_a_real_program(outer: int, inner: int) -> None:
    """Every iteration of the inner scan runs outer x inner times."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            y, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)
            return y, None

        return jax.lax.scan(step, x, None, length=outer)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 32), (inner, 32, 32))]
    text = jax.jit(f).lower(*shapes).compile().as_text()
    sines = [v for v in loops.walk(hlo.parse(text)) if v.instruction.opcode == "sine"]
    assert sum(v.times * v.instruction.arrays[0].size for v in sines) == outer * inner * 16 * 32
