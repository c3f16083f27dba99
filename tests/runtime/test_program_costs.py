"""Costs of programs against counts by hand: on forced CPU devices, and in the forms that compilers for TPUs write."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.runtime import hlo, program_costs

DEVICES = 8
BATCH, WIDTH, STEPS = 16, 32, 5
MESH = Mesh(jax.devices()[:DEVICES], ("data",), axis_types=(AxisType.Auto,))


def products(x, weights):
    """Products in a loop, a known number of times."""
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights), None), x, None, length=STEPS)[0]


def costs(function, spec, *args):
    where = NamedSharding(MESH, spec)
    return program_costs.of_compiled(jax.jit(function, in_shardings=(where, None)).lower(*args).compile())


ARGS = jnp.ones((BATCH, WIDTH)), jnp.ones((WIDTH, WIDTH))
FLOPS = STEPS * 2 * BATCH * WIDTH**2


def test_loops_are_counted_as_often_as_they_run():
    assert program_costs.of_jaxpr(jax.make_jaxpr(products)(*ARGS).jaxpr) == FLOPS
    assert costs(products, P("data"), *ARGS).flops == FLOPS / DEVICES
    assert costs(products, P(), *ARGS).flops == FLOPS  # every device computes everything


def test_loops_of_unknown_length_run_as_often_as_stated():
    def search(x, weights):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ weights, x)

    jaxpr = jax.make_jaxpr(search)(*ARGS).jaxpr
    compiled = jax.jit(search).lower(*ARGS).compile()
    assert (
        program_costs.of_jaxpr(jaxpr, unknown_loops=STEPS)
        == program_costs.of_compiled(compiled, unknown_loops=STEPS).flops
        == FLOPS
    )


def test_collectives_are_counted_by_kind_in_bytes():
    def total(x, weights):
        return jax.lax.scan(
            lambda carry, _: (carry + jnp.sum(x * carry[None], axis=0), None), weights, None, length=STEPS
        )[0]

    found = costs(total, P("data"), ARGS[0], ARGS[1][0])
    assert found.bytes == {"all-reduce": STEPS * 4 * WIDTH} and found.flops == 0


DISGUISED = """HloModule jit_f, num_partitions=4

%fused (param_0: bf16[8,32,16], param_1: bf16[8,16,64]) -> bf16[8,32,64] {
  %param_0 = bf16[8,32,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[8,32,64]{2,1,0} convolution(%param_0, %param_1), WINDOW
}

ENTRY %main (a: bf16[8,32,16], b: bf16[8,16,64]) -> bf16[8,32,64] {
  %a = bf16[8,32,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %fusion = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""
DISGUISED = DISGUISED.replace("WINDOW", "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf")


def test_products_of_many_matrices_are_convolutions_on_tpus():
    """The axis of the matrices is a spatial one, with a hole of 7 elements after each: every tap of 8 reads one."""
    assert program_costs.of_text(DISGUISED).flops == 2 * 8 * 32 * 64 * 16


def test_traffic_is_that_of_main_memory():
    """The second operand lies in fast memory, S(1)."""
    assert program_costs.of_text(DISGUISED).memory == 2 * (8 * 32 * 16 + 8 * 32 * 64)


LOOP = """HloModule jit_f, num_partitions=4

%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %sum = f32[16]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[16]) tuple(%next, %sum)
}

%condition (p: (s32[], f32[16])) -> pred[] {
  %p = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: (s32[], f32[16])) -> f32[64] {
  %p = (s32[], f32[16]) parameter(0)
  %loop = (s32[], f32[16]) while(%p), condition=%condition, body=%body
  %x = f32[16]{0} get-tuple-element(%loop), index=1
  %start = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %all = f32[64]{0} all-gather-done(%start)
}
"""


def test_bytes_received_depend_on_the_kind_and_the_size_of_the_group():
    """An all-reduce of two devices receives what it sums; of an all-gather of four, three quarters are others'."""
    found = program_costs.of_text(LOOP)
    assert found.calls == {"all-reduce": 5, "all-gather": 1}
    assert found.bytes == {"all-reduce": 5 * 64, "all-gather": 256}
    assert found.received == 5 * 64 + 0.75 * 256


UPDATE = """HloModule jit_f

%fused (param_0: f32[100,16], param_1: f32[1,16], param_2: s32[]) -> f32[100,16] {
  %param_0 = f32[100,16]{1,0} parameter(0)
  %param_1 = f32[1,16]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[100,16]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %zero)
}

ENTRY %main (a: f32[100,16], b: f32[1,16], i: s32[]) -> f32[100,16] {
  %a = f32[100,16]{1,0} parameter(0)
  %b = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %fusion = f32[100,16]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%fused
}
"""


def test_an_update_in_place_moves_the_update_only():
    assert program_costs.of_text(UPDATE).memory == 2 * 64 + 4


@pytest.mark.parametrize(
    ("shape", "size"), [("bf16[2,3]{1,0}", 12), ("s4[8]{0}", 4), ("(f8e4m3fn[8]{0}, pred[])", 9), ("token[]", 0)]
)
def test_sizes_of_shapes(shape, size):
    assert hlo.size_of_shape(shape) == size
