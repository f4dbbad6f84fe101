"""Compiled programs as text: how often instructions run, what collectives and memory move."""
import textwrap

import jax
import jax.numpy as jnp
import pytest

from lskd_jax import parallel
from lskd_jax.plan import hlo, traffic

# A loop of four turns around a fusion, an all-gather that stands twice, and a conditional.
LOOP = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    FileNames
    1 "/somewhere/lskd_jax/models/vit.py"
    2 "/somewhere/lskd_jax/models/layers.py"

    FunctionNames
    1 "Block.__call__"
    2 "Dense.__call__"

    FileLocations
    1 {file_name_id=1 function_name_id=1 line=80 end_line=80 column=2 end_column=9}
    2 {file_name_id=2 function_name_id=2 line=61 end_line=61 column=2 end_column=9}

    StackFrames
    1 {file_location_id=1 parent_frame_id=1}
    2 {file_location_id=2 parent_frame_id=2}

    %fused (p0: f32[4,8,16], p1: s32[]) -> f32[8,16] {
      %p0 = f32[4,8,16]{2,1,0:T(8,128)} parameter(0)
      %p1 = s32[] parameter(1)
      %zero = s32[] constant(0)
      %cut = f32[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
      ROOT %flat = f32[8,16]{1,0} bitcast(%cut)
    }

    %cond (c: (s32[], f32[4,8,16])) -> pred[] {
      %c = (s32[], f32[4,8,16]{2,1,0}) parameter(0)
      %i = s32[] get-tuple-element(%c), index=0
      %end = s32[]{:T(128)} constant(4)
      ROOT %less = pred[] compare(%i, %end), direction=LT
    }

    %body (b: (s32[], f32[4,8,16])) -> (s32[], f32[4,8,16]) {
      %b = (s32[], /*index=1*/f32[4,8,16]{2,1,0}) parameter(0)
      %i.1 = s32[] get-tuple-element(%b), index=0
      %stack = f32[4,8,16]{2,1,0} get-tuple-element(%b), index=1
      %row = f32[8,16]{1,0} fusion(%stack, %i.1), kind=kLoop, calls=%fused, metadata={stack_frame_id=2}
      %near = f32[8,16]{1,0:T(8,128)S(1)} copy(%row)
      %all.1 = bf16[32,16]{1,0} all-gather(%near), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
      %all.2 = bf16[32,16]{1,0} all-gather(%near), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
      ROOT %next = (s32[], f32[4,8,16]{2,1,0}) tuple(%i.1, %stack)
    }

    ENTRY %main (x: f32[4,8,16]) -> f32[4,8,16] {
      %x = f32[4,8,16]{2,1,0} parameter(0)
      %start = s32[] constant(0)
      %in = (s32[], f32[4,8,16]{2,1,0}) tuple(%start, %x)
      %loop = (s32[], f32[4,8,16]{2,1,0}) while(%in), condition=%cond, body=%body
      ROOT %out = f32[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
    }
    """)


def lines(*instructions: str) -> str:
  """A module of these instructions alone."""
  return "\n".join(["ENTRY %main () -> f32[] {", *(f"  {line}" for line in instructions), "}"])


def the_collective(line: str, slice_of=(0,) * 8) -> hlo.Collective:
  found, = hlo.collectives(hlo.parse(lines(line)), slice_of)
  return found


def test_the_body_of_a_loop_runs_as_often_as_the_loop_turns():
  times = hlo.runs(hlo.parse(LOOP)).times
  assert (times["main"], times["body"], times["fused"]) == (1, 4, 4)


def test_a_known_trip_count_comes_before_what_the_condition_says():
  known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
  assert hlo.runs(hlo.parse(known)).times["body"] == 9


def test_loops_inside_loops_multiply():
  inner = LOOP.replace("ROOT %next", "%again = (s32[]) while(%b), condition=%cond, body=%inner\n  ROOT %next")
  inner = inner.replace("ENTRY", "%inner (p: s32[]) -> s32[] {\n  %p = s32[] parameter(0)\n}\n\nENTRY")
  assert hlo.runs(hlo.parse(inner)).times["inner"] == 16


def test_all_branches_of_a_conditional_count():
  text = lines("%r = f32[] conditional(%i, %a, %b), branch_computations={%one, %two}")
  assert set(hlo.runs(hlo.parse(text)).times) == {"main", "one", "two"}


def test_a_collective_counts_once_for_each_channel_and_turn_of_its_loop():
  found, = hlo.collectives(hlo.parse(LOOP), [0] * 8)
  assert found == hlo.Collective("all-gather", 4, 32 * 16 * 2, 4, False)
  assert found.network == 4 * 32 * 16 * 2 * 3 / 4


# As libtpu writes the gradients of a scan of five layers: the first turn is taken out of the loop, and a sum
# of which each device keeps a part is a fusion around an all-reduce.
RING = 'backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}'
GROUP = "replica_groups={{0,1,2,3}}"
PEELED = textwrap.dedent(f"""\
    %all-reduce-scatter.1 (input: bf16[1936,8,128]) -> bf16[484,8,128] {{
      %input = bf16[1936,8,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
      ROOT %all-reduce.13 = bf16[1936,8,128] all-reduce(%input), channel_id=3, {GROUP}
    }}

    %all-reduce-scatter.2 (input.2: bf16[1936,8,128]) -> bf16[484,8,128] {{
      %input.2 = bf16[1936,8,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
      ROOT %all-reduce.10 = bf16[1936,8,128] all-reduce(%input.2), channel_id=3, {GROUP}
    }}

    %body (b: (bf16[8], s32[])) -> (bf16[8], s32[]) {{
      %b = (bf16[8]{{0}}, s32[]{{:T(128)}}) parameter(0)
      ROOT %fusion.62 = bf16[484,8,128] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1, {RING}
    }}

    %cond (c: (bf16[8], s32[])) -> pred[] {{
      %constant.118 = s32[]{{:T(128)}} constant(5)
      %c = (bf16[8]{{0}}, s32[]{{:T(128)}}) parameter(0)
      %i = s32[]{{:T(128)}} get-tuple-element(%c), index=1
      ROOT %lt = pred[]{{:T(512)}} compare(%i, %constant.118), direction=LT
    }}

    ENTRY %main (x: bf16[8]) -> bf16[8] {{
      %x = bf16[8]{{0}} parameter(0)
      %constant.115 = s32[]{{:T(128)}} constant(1)
      %copy.61 = s32[]{{:T(128)}} copy(%constant.115)
      %fusion.2 = bf16[484,8,128] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2, {RING}
      %tuple.123 = (bf16[8]{{0}}, s32[]{{:T(128)}}) tuple(%x, %copy.61)
      ROOT %while.125 = (bf16[8]{{0}}, s32[]{{:T(128)}}) while(%tuple.123), condition=%cond, body=%body
    }}
    """)


def test_a_loop_whose_first_turn_was_taken_out_turns_once_less():
  assert hlo.runs(hlo.parse(PEELED)).times["body"] == 4
  from_the_start = PEELED.replace("constant(1)", "constant(0)")
  assert hlo.runs(hlo.parse(from_the_start)).times["body"] == 5


def test_a_turn_that_was_taken_out_of_a_loop_counts_beside_those_left_in_it():
  assert sorted(one.times for one in hlo.collectives(hlo.parse(PEELED), [0] * 4)) == [1, 4]


def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
  for one in hlo.collectives(hlo.parse(PEELED), [0] * 4):
    assert (one.kind, one.result, one.group) == ("reduce-scatter", 484 * 8 * 128 * 2, 4)
    assert one.network == one.times * 3 * 484 * 8 * 128 * 2


def test_collectives_that_share_a_channel_all_count():
  """As libtpu writes three gathers within `jax.shard_map`, the first in pieces beside other work."""
  gather, named = f"channel_id=1, {GROUP}, dimensions={{0}}", 'async_collective_name="all-gather-start.1"'
  text = textwrap.dedent(f"""\
      %fused_computation.10 (p: bf16[128]) -> bf16[512] {{
        %p = bf16[128]{{0}} parameter(0)
        ROOT %all-gather.13 = bf16[512]{{0}} all-gather(%p), {gather}, frontend_attributes={{chain_id="0"}}
      }}

      %async_collective_fusion.36 (p.1: bf16[128]) -> bf16[512] {{
        %p.1 = bf16[128]{{0}} parameter(0)
        ROOT %all-gather.15 = bf16[512]{{0}} all-gather(%p.1), {gather}, frontend_attributes={{chain_id="0"}}
      }}

      ENTRY %main (x: bf16[128], y: bf16[64]) -> bf16[512] {{
        %x = bf16[128]{{0}} parameter(0)
        %y = bf16[64]{{0}} parameter(1)
        %async-collective-start = bf16[512]{{0}} fusion(%x), kind=kCustom, calls=%fused_computation.10
        %fusion.36 = bf16[512]{{0}} fusion(%x), kind=kOutput, calls=%async_collective_fusion.36
        %all-gather.18 = bf16[256]{{0}} all-gather(%y), {gather}, frontend_attributes={{{named}}}
        ROOT %all-gather.20 = bf16[256]{{0}} all-gather(%y), {gather}
      }}
      """)
  assert sorted(one.result for one in hlo.collectives(hlo.parse(text), [0] * 4)) == [512, 512, 1024]


def test_each_gather_within_shard_map_counts_as_often_as_it_runs():
  mesh = parallel.make_mesh(fsdp=8)

  @jax.shard_map(mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"))
  def on_device(x):
    whole = lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)
    turn = lambda x, _: (jnp.tanh(x) * whole(x).sum(), None)
    return jax.lax.scan(turn, x * whole(jnp.sin(x)).sum(), length=5)[0]
  rows = jax.ShapeDtypeStruct((16, 4), "float32", sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
  program = hlo.parse(jax.jit(on_device).lower(rows).compile().as_text())
  assert sorted(one.times for one in hlo.collectives(program, [0] * 8)) == [1, 5]


@pytest.mark.parametrize("kind,result,sent", [
    ("all-reduce", 400, 600), ("all-gather", 400, 300), ("reduce-scatter", 100, 300),
    ("all-to-all", 400, 300)])
def test_what_a_device_sends_in_a_ring_of_four(kind, result, sent):
  line = f"%c = s8[{result}]{{0}} {kind}(%x), channel_id=1, replica_groups={{{{0,1,2,3}}}}"
  assert the_collective(line).network == sent


def test_an_asynchronous_start_holds_its_operand_and_its_result():
  line = ("%s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) all-gather-start(%x), channel_id=1, "
          "replica_groups={{0,1,2,3}}, dimensions={0}")
  assert the_collective(line).result == 128


def test_a_permute_sends_its_whole_result():
  line = ("%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, "
          "source_target_pairs={{0,1},{1,0}}")
  assert the_collective(line).network == 16


@pytest.mark.parametrize("written,groups", [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]])])
def test_groups_of_devices_are_read_in_every_way_they_are_written(written, groups):
  assert hlo.device_groups(f", channel_id=3, {written}, dimensions={{0}}", 4) == groups


def test_a_group_with_devices_of_two_slices_goes_over_dcn():
  line = "%c = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=mesh['s'=2,'f'=2] "
  assert the_collective(line + "{'s'}", (0, 0, 1, 1)).crosses
  assert not the_collective(line + "{'f'}", (0, 0, 1, 1)).crosses


def test_what_a_tpu_receives_through_its_host_goes_over_dcn():
  line = ('%r = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, '
          'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')
  assert the_collective(line, (0, 0, 1, 1)) == hlo.Collective("all-reduce", 1, 32, 2, True)


def test_memory_traffic_counts_slices_of_stacks_and_no_fast_memory():
  row = 8 * 16 * 4
  # Each turn: the fusion reads and writes a row, the copy reads it into fast memory, the two gathers
  # write their result.
  turn = 2 * row + row + 2 * 32 * 16 * 2
  # A scalar that the fusion reads: its index.
  assert sum(traffic.traffic(hlo.parse(LOOP)).values()) == 4 * (turn + 4)


def test_memory_traffic_of_a_fusion_that_writes_into_a_stack_is_what_it_writes():
  text = textwrap.dedent("""\
      %fused (p0: f32[100,8], p1: f32[1,8], p2: s32[]) -> f32[100,8] {
        %p0 = f32[100,8]{1,0} parameter(0)
        %p1 = f32[1,8]{1,0} parameter(1)
        %p2 = s32[] parameter(2)
        ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
      }

      ENTRY %main (a: f32[100,8], b: f32[1,8], i: s32[]) -> f32[100,8] {
        %a = f32[100,8]{1,0} parameter(0)
        %b = f32[1,8]{1,0} parameter(1)
        %i = s32[] parameter(2)
        ROOT %f = f32[100,8]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%fused
      }
      """)
  assert sum(traffic.traffic(hlo.parse(text)).values()) == 32 + 32 + 4


def test_traffic_is_laid_to_the_innermost_line_that_is_not_a_dense_layers():
  assert traffic.places(LOOP) == {1: "models/vit.py:80 Block.__call__", 2: "models/vit.py:80 Block.__call__"}
  assert traffic.traffic(hlo.parse(LOOP))[2] == 4 * (2 * 8 * 16 * 4 + 4)


def test_bytes_of_types_of_all_widths():
  sizes = lambda kind: [size for size, _ in hlo.arrays(kind)]
  assert sizes("(f32[2,3]{1,0}, bf16[4], pred[], s4[8], f8e4m3fn[5], token[])") == [24, 8, 1, 4, 5, 0]


def test_a_text_that_is_no_module_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("something else")


def test_a_kernels_settings_over_several_lines_do_not_end_a_loop():
  """As fused attention is written: without the rest of its block, a tower seems to cost next to nothing."""
  kernel = '  %k = f32[8]{0} custom-call(%p), backend_config={"metadata":{"a": 1\n"b": 2\n}}, metadata={}\n'
  text = ("HloModule jit_step\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
          + kernel + "  ROOT %after = f32[8]{0} negate(%k)\n}\n")
  assert [one.name for one in hlo.parse(text).computations["main"]] == ["p", "k", "after"]
