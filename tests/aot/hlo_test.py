# ruff: noqa: E501 (programs have long lines)
"""Analysis of compiled HLO programs: collectives, multiplied by loop iterations, and bytes of memory traffic."""

import jax
import jax.numpy as jnp

from ilm_jax.aot import hlo
from ilm_jax.aot.collectives import collectives
from ilm_jax.aot.memory_traffic import bytes_moved

TEXT = """\
HloModule jit_step

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[64,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], metadata={op_name="jit(step)/scan/head"}
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%counting (p: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %passed = f32[8,32]{1,0} collective-permute(%y), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %two = s32[] constant(2)
  %before = s32[] get-tuple-element(%p), index=2
  %after = s32[] add(%before, %two)
  ROOT %out = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) tuple(%i, %x, %after)
}

%below (p: (s32[], f32[8,16], s32[])) -> pred[] {
  %limit = s32[] constant(7)
  %count = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%unknown (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %moved = (bf16[4,16]{1,0}, bf16[4,16]{1,0}) collective-permute-start(%y), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%all-reduce-scatter.2 (a: f32[128]) -> f32[32] {
  %whole = f32[128]{0} all-reduce(%a), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = f32[32]{0} dynamic-slice(%whole, %i)
}

%branch (a: f32[2]) -> f32[4] {
  ROOT %pair = ((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%a, %b), channel_id=8, replica_groups=[4,2]<=[8]
}

%part.1 (a: f32[2]) -> f32[32,16] {
  ROOT %part = f32[32,16]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %begin = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) tuple(%i, %a, /*index=2*/%copied)
  %counted = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) while(%begin), condition=%below, body=%counting
  %other = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%unknown
  %sum = (f32[32,16]{1,0}, f32[2]{0}) all-reduce(%a, %b), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  %first = f32[32,16]{1,0} fusion(%a), kind=kCustom, calls=%part.1
  %fused = f32[32]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
  %chosen = f32[4]{0} conditional(%p, %a, %b), true_computation=%branch, false_computation=%add
  %again = f32[32,16]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %scattered = f32[1,16]{1,0} reduce-scatter(%a), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


MOVES = """\
HloModule jit_step

%fused (a: f32[10,100], b: f32[100], c: f32[10,100]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %c = f32[10,100]{1,0} parameter(2)
  %row = f32[1,100]{1,0} dynamic-slice(%a, %i, %z)
  %sum = f32[1,100]{1,0} add(%row, %b)
  ROOT %into = f32[10,100]{1,0} dynamic-update-slice(%c, %sum, %i, %z)
}

%body (p: (f32[10,100], f32[100], f32[10,100])) -> (f32[10,100], f32[100], f32[10,100]) {
  %x = f32[10,100]{1,0} get-tuple-element(%p), index=0
  %y = f32[100]{0:T(128)} get-tuple-element(%p), index=1
  %z = f32[10,100]{1,0} get-tuple-element(%p), index=2
  %stacked = f32[10,100]{1,0} fusion(%x, %y, %z), kind=kLoop, calls=%fused
  ROOT %out = (f32[10,100]{1,0}, f32[100]{0}, f32[10,100]{1,0}) tuple(%x, %y, %stacked)
}

%condition (p: (f32[10,100], f32[100], f32[10,100])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[10,100], b: f32[100]) -> f32[100] {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %start = (f32[10,100]{1,0}, f32[100]{0}, f32[10,100]{1,0}) tuple(%a, %b, %a)
  %loop = (f32[10,100]{1,0}, f32[100]{0}, f32[10,100]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %here = f32[10,100]{1,0} get-tuple-element(%loop), index=2
  %fetch = (f32[10,100]{1,0:T(8,128)S(1)}, f32[10,100]{1,0}, u32[]{:S(2)}) copy-start(%here)
  %there = f32[10,100]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %kept = f32[10,100]{1,0:T(8,128)S(1)} multiply(%there, %there)
  %all = (f32[100]{0}, f32[400]{0}) all-gather-start(%b), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %sent = (f32[100]{0}, f32[100]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1}}
  ROOT %total = f32[100]{0} reduce(%kept, %zero), dimensions={0}, to_apply=%add
}
"""


def test_memory_traffic_counts_only_the_parts_of_sliced_arrays():
  row = 4 * 100
  turn = row + row + row  # per iteration: read one row of x and all of y, write one row of z
  started = (row + 4 * row) + (row + row)
  # The program has a loop of ten iterations, a copy to on-chip memory, two asynchronous collectives and a result.
  assert bytes_moved(hlo.parse(MOVES)) == 10 * turn + 10 * row + started + row


def test_memory_traffic_of_a_matrix_product_is_the_size_of_its_operands_and_result():
  def several(x, ys):
    return jax.lax.scan(lambda x, y: (jnp.tanh(x @ y), None), x, ys)[0]

  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (7, 256, 256))]
  once = 4 * (64 * 256 + 256 * 256 + 64 * 256)
  text = jax.jit(several).lower(*shapes).compile().as_text()
  assert 7 * once <= bytes_moved(hlo.parse(text)) < 7 * 3 * once


def test_collectives_in_loops_count_once_per_iteration_and_each_channel_is_listed_once():
  found = {(one.kind, one.size): one for one in collectives(hlo.parse(TEXT), 8)}
  assert len(found) == 8
  counted = found['collective-permute', 8 * 32 * 4]
  assert (counted.times, counted.certain) == (4, True)  # loop counter: 0, 2, 4, 6
  fused = found['reduce-scatter', 128 * 4 // 4]
  assert (fused.group, fused.traffic()) == (4, 3 * 128)
  assert found['all-gather', (4 + 6) * 4].group == 2  # one operation gathers two arrays, of 4 and 6 floats
  head = found['all-gather', 64 * 16 * 4]
  assert (head.group, head.times, head.certain, head.where) == (8, 5, True, 'jit(step)/scan/head')
  assert head.traffic() == 5 * 7 / 8 * 64 * 16 * 4
  moved = found['collective-permute', 4 * 16 * 2]
  assert (moved.times, moved.certain, moved.traffic()) == (1, False, 128)
  several = found['all-reduce', (32 * 16 + 2) * 4]
  assert (several.group, several.times, several.traffic()) == (2, 1, (32 * 16 + 2) * 4)
  assert (found['all-reduce', 32 * 16 * 4].group, found['all-reduce', 32 * 16 * 4].times) == (4, 1)
  assert found['reduce-scatter', 64].traffic() == 3 * 64
  traffic = [one.traffic() for one in collectives(hlo.parse(TEXT), 8)]
  assert traffic == sorted(traffic, reverse=True)
