"""hlo on hand-written program text and on a program that XLA compiles here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hashvision.planning import hlo

# In the form of libtpu: cycles at the call of a fusion, the trip count in a loop's condition,
# collectives inside called computations.
TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} add(%p, %p)
}

%async_computation (p: bf16[16]) -> bf16[128] {
  ROOT %g = bf16[128]{0:T(128)} all-gather(%p), replica_groups=[4,8]<=[32], dimensions={0}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = f32[8]{0} fusion(%x), calls=%fused_computation, backend_config={"estimated_cycles":"10"}
  %r = (f32[8]{0}, f32[4]{0}) all-reduce(%f.1, %y), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %f.1)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%i, %constant.2), direction=LT
}

%unused (p: f32[8]) -> f32[8] {
  %f.3 = f32[8]{0} fusion(%x), calls=%fused_computation, backend_config={"estimated_cycles":"999"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %f.2 = f32[8]{0} fusion(%x), calls=%fused_computation, backend_config={"estimated_cycles":"7"}
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %s = ((bf16[16]{0}), bf16[128]{0}) async-start(%f.2), calls=%async_computation
  %d = f32[2]{0} reduce-scatter(%w), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  ROOT %p = (f32[6]{0}, f32[6]{0}) collective-permute-start(%w), source_target_pairs={{0,1}}
}
"""


def test_cycles_multiply_loops_by_trips_and_skip_unused_computations():
    assert hlo.cycles(TEXT) == 7 + 5 * 10
    known = TEXT.replace("body=%body\n", 'body=%body, config={"known_trip_count":{"n":"3"}}\n')
    assert hlo.cycles(known) == 7 + 3 * 10
    assert hlo.cycles(TEXT.replace("direction=LT", "direction=GT")) == 7 + 10


def test_collectives_are_found_in_loops_and_called_computations():
    assert hlo.collectives(TEXT) == [
        ("all-gather", 128, 256, 8, 1),
        ("all-reduce", 12, 48, 4, 5),
        ("collective-permute", 6, 24, 0, 1),
        ("reduce-scatter", 2, 8, 2, 1),
    ]


def test_bytes_sent_are_for_a_ring():
    # Chan et al. 2007, section 4: (n - 1) / n of the whole, twice that for an all-reduce.
    sent = {each.kind: each.sent for each in hlo.collectives(TEXT)}
    assert sent == {
        "all-gather": 256 * 7 / 8,
        "all-reduce": 5 * 2 * 48 * 3 / 4,
        "collective-permute": 24,
        "reduce-scatter": 8,  # the sum has 16 bytes; half goes to the other device
    }


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("[4,8]<=[32]", 8),
        ("{{0,1,2},{3,4,5}}", 3),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0','axis_2'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4,'axis_1'}", 8),
        ("", 0),
    ],
)
def test_all_notations_of_replica_groups(groups, devices):
    line = f"%r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    assert [each.devices for each in hlo.collectives(text)] == [devices]


@pytest.mark.parametrize("trips", [1, 3])
def test_all_reduces_in_a_compiled_loop_on_8_devices(trips):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def step(x: jax.Array) -> jax.Array:
        def add(total: jax.Array, factor: jax.Array) -> tuple[jax.Array, None]:
            return total + jnp.tanh(x * factor + total.sum()).sum(0), None

        return jax.lax.scan(add, jnp.zeros(5), jnp.arange(1.0, 1 + trips))[0]

    x = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=parts)
    text = jax.jit(step, out_shardings=whole).lower(x).compile().as_text()
    reductions = [each for each in hlo.collectives(text) if each.elements == 5]
    assert sum(each.times for each in reductions) == trips
    assert {(each.kind, each.size, each.devices) for each in reductions} == {("all-reduce", 20, 8)}
    assert hlo.cycles(text) == 0  # XLA for CPU makes no estimates
