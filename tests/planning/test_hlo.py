"""Reading compiled programs: loops, groups, traffic, and where an array comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.nn.kernels import packed_attention
from jaxlm.planning import hlo, hlo_text

MESH = {"data": 2, "fsdp": 4}
TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/x/jaxlm/nn/layout.py"
2 "/x/jaxlm/models/llama.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=93 end_line=93 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=2}
2 {file_location_id=2 parent_frame_id=2}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (p0: f32[64,8]) -> f32[16,8] {
  %p0 = f32[64,8]{1,0} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p0), replica_groups=[2,4]<=[8], to_apply=%add
  %id = u32[] partition-id()
  ROOT %mine = f32[16,8]{1,0} dynamic-slice(%all-reduce.1, %id, %id), dynamic_slice_sizes={16,8}
}

%cut (q0: f32[12,64], q1: s32[]) -> f32[64] {
  %q0 = f32[12,64]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %one = f32[1,64]{1,0} dynamic-slice(%q0, %q1, %q1), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%one)
}

%body (t: (s32[], f32[12,64], f32[64,8])) -> (s32[], f32[12,64], f32[64,8]) {
  %t = (s32[]{:T(128)}, f32[12,64]{1,0}, f32[64,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %w = f32[12,64]{1,0} get-tuple-element(%t), index=1
  %row = f32[64]{0} fusion(%w, %i), kind=kLoop, calls=%cut, backend_config={"estimated_cycles":"10"}
  %near = f32[64]{0:T(128)S(1)} copy(%row)
  %x = f32[64,8]{1,0} get-tuple-element(%t), index=2
  %part = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter
  %whole = f32[64,8]{1,0} all-gather(%part), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, metadata={op_name="jit(f)/while/body/dot" stack_frame_id=1}
  ROOT %out = (s32[], f32[12,64]{1,0}, f32[64,8]{1,0}) tuple(%next, %w, %whole)
}

%condition (t.1: (s32[], f32[12,64], f32[64,8])) -> pred[] {
  %t.1 = (s32[], f32[12,64]{1,0}, f32[64,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (arg: f32[12,64], arg.1: f32[64,8]) -> f32[64,8] {
  %arg = f32[12,64]{1,0} parameter(0)
  %arg.1 = f32[64,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %b = (s32[], f32[12,64]{1,0}, f32[64,8]{1,0}) tuple(%zero, %arg, %arg.1)
  %kernel = f32[8]{0} custom-call(%arg.1), custom_call_target="k", backend_config={"text":"several
}} lines"}
  %loop = (s32[], f32[12,64]{1,0}, f32[64,8]{1,0}) while(%start), condition=%condition, body=%body
  %r = f32[64,8]{1,0} get-tuple-element(%loop), index=2
  %moved = (f32[64,8]{1,0}, f32[64,8]{1,0}, u32[], u32[]) collective-permute-start(%r), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %done = f32[64,8]{1,0} collective-permute-done(%moved)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    return hlo.Module(TEXT, MESH)


def test_a_loop_counts_as_often_as_it_runs(module) -> None:
    """Up to 12 in steps of 2."""
    assert module.runs == {"main": 1, "body": 6}


def test_collectives_with_their_axes_bytes_and_times(module) -> None:
    found = {(c.kind, c.axes): c for c in module.collectives}
    assert {k: (c.ways, c.bytes, c.times) for k, c in found.items()} == {
        ("reduce-scatter", ("fsdp",)): (4, 2048, 6),  # an all-reduce of which the kernel keeps its slice
        ("all-gather", ("fsdp",)): (4, 2048, 6),
        ("collective-permute", ("data",)): (2, 2048, 1),
    }
    assert found["all-gather", ("fsdp",)].sent == 6 * 2048 * 3 / 4
    assert found["collective-permute", ("data",)].sent == 2048


def test_traffic_counts_slices_and_leaves_out_the_memory_beside_the_core(module) -> None:
    row, copy, scatter, gather = 2 * 256 + 4, 256, 2048 + 512, 2048 + 512
    assert module.traffic == 6 * (row + copy + scatter + gather + 3 * 4) + 2 * 2048 + 8 + 32 + 2048


def test_cycles_and_source_lines(module) -> None:
    assert module.estimated_cycles == 60
    largest = module.buffers(9)
    assert any(b.where == "models/llama.py:93 while/body/dot" and b.bytes == 2048 for b in largest)


@pytest.mark.parametrize(("text", "group"), [
    ("replica_groups={{0,2},{1,3}}", (0, 2)),
    ("replica_groups=[4,2]<=[8]", (0, 1)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
    ("source_target_pairs={{0,1},{1,2},{2,0},{4,5}}", (0, 1, 2)),
    ("dimensions={0}", ()),
])  # fmt: skip
def test_groups_in_every_notation(text: str, group: tuple) -> None:
    assert hlo_text.first_group(text) == group


def test_a_real_program() -> None:
    """A scan of 5 products whose weights are sharded and used whole, compiled for eight devices."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def f(w, x):
        whole = NamedSharding(mesh, PartitionSpec())
        layer = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None)  # noqa: E731
        return jax.lax.scan(layer, x, w)[0]

    module = hlo.Module(jax.jit(f).lower(w, x).compile().as_text(), {"fsdp": 8})
    gathered = [c for c in module.collectives if c.kind == "all-gather"]
    assert sum(c.bytes * c.times for c in gathered) == 5 * 16 * 16 * 4
    assert {c.axes for c in gathered} == {("fsdp",)}
    assert np.prod([module.runs[n] for n in module.runs]) % 5 == 0 or len(gathered) == 1


@pytest.mark.parametrize("exchange", [
    "f32[64,8] ragged-all-to-all(%p, %e, %n, %n, %n, %n)",
    "((f32[16,8], f32[64,8], s64[4], s64[4], s64[4], s64[4]), f32[64,8]) "
    "ragged-all-to-all-start(%p, %e, %n, %n, %n, %n)",
])  # fmt: skip
def test_a_ragged_exchange_sends_rows_and_not_the_room_for_them(exchange: str) -> None:
    text = f"""HloModule m

ENTRY %main () -> f32[64,8] {{
  %p = f32[16,8] parameter(0)
  %e = f32[64,8] parameter(1)
  %n = s64[4] parameter(2)
  ROOT %r = {exchange}, replica_groups={{{{0,1,2,3}}}}
}}
"""
    (one,) = hlo.Module(text, {"expert": 4}).collectives
    assert (one.kind, one.axes, one.bytes) == ("ragged-all-to-all", ("expert",), 16 * 8 * 4)


def test_traffic_of_slices_within_nested_kernels_and_of_several_results() -> None:
    """A stack is neither read whole where a kernel in a kernel cuts it, nor written whole beside another result."""
    text = """HloModule m

%cut (s: f32[9,4], i: s32[]) -> f32[1,4] {
  %s = f32[9,4] parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,4] dynamic-slice(%s, %i, %i), dynamic_slice_sizes={1,4}
}

%outer (t: f32[9,4], j: s32[]) -> (f32[9,4], f32[1,4]) {
  %t = f32[9,4] parameter(0)
  %j = s32[] parameter(1)
  %f = f32[1,4] fusion(%t, %j), kind=kLoop, calls=%cut
  %u = f32[9,4] dynamic-update-slice(%t, %f, %j, %j)
  ROOT %both = (f32[9,4], f32[1,4]) tuple(%u, %f)
}

ENTRY %main (p: f32[9,4], k: s32[]) -> (f32[9,4], f32[1,4]) {
  %p = f32[9,4] parameter(0)
  %k = s32[] parameter(1)
  ROOT %r = (f32[9,4], f32[1,4]) fusion(%p, %k), kind=kLoop, calls=%outer
}
"""
    row, index = 4 * 4, 4
    assert (
        hlo.Module(text).traffic == row + index + 2 * row
    )  # the slice and where; the slice into the stack, and itself


def test_loops_that_mostly_do_not_run_are_those_that_attention_names() -> None:
    assert hlo.RARE == packed_attention.FURTHER
    line = (
        '  %w = f32[4]{0} while(%t), condition=%c, body=%b, metadata={op_name="jit(f)/NAME/while"}, '
        'backend_config={"known_trip_count":{"n":"7"}}'
    )
    found = [hlo_text.instruction(line.replace("NAME", name)) for name in ("other", packed_attention.FURTHER)]
    assert [hlo.Module("").trips(i) for i in found] == [7, 0]


def test_a_kernel_that_others_run_beside_moves_its_slices_once() -> None:
    text = """HloModule m

%put (s: f32[9,4], x: f32[1,4], i: s32[]) -> f32[9,4] {
  %s = f32[9,4] parameter(0)
  %x = f32[1,4] parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[9,4] dynamic-update-slice(%s, %x, %i, %i)
}

ENTRY %main (p: f32[9,4], q: f32[1,4], k: s32[]) -> f32[9,4] {
  %p = f32[9,4]{1,0} parameter(0)
  %q = f32[1,4]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %b = ((f32[9,4]{1,0}, f32[1,4]{1,0}, s32[]), f32[9,4]{1,0}, u32[]) fusion-start(%p, %q, %k), kind=kLoop, calls=%put
  ROOT %done = f32[9,4]{1,0} fusion-done(%b)
}
"""
    module, row, index = hlo.Module(text), 4 * 4, 4
    assert module.traffic == row + index + row
    assert [(b.bytes, b.shape) for b in module.buffers()] == [(9 * row, "f32[9,4]")]


def test_traffic_of_rows_that_are_gathered_and_scattered_in_place() -> None:
    """A cache that rows are written to, and a table that some are looked up in, are neither read nor written whole."""
    text = """HloModule m

%put (c: f32[9,4], at: s32[2,1], x: f32[2,4]) -> f32[9,4] {
  %c = f32[9,4] parameter(0)
  %at = s32[2,1] parameter(1)
  %x = f32[2,4] parameter(2)
  ROOT %s = f32[9,4] scatter(%c, %at, %x), update_window_dims={1}, to_apply=%region
}

%look (t: f32[99,4], at: s32[2,1]) -> f32[2,4] {
  %t = f32[99,4] parameter(0)
  %at = s32[2,1] parameter(1)
  %g = f32[2,4] gather(%t, %at), offset_dims={1}, slice_sizes={1,4}
  ROOT %n = f32[2,4] negate(%g)
}

ENTRY %main (p: f32[9,4], q: f32[99,4], at: s32[2,1]) -> f32[9,4] {
  %p = f32[9,4] parameter(0)
  %q = f32[99,4] parameter(1)
  %at = s32[2,1] parameter(2)
  %l = f32[2,4] fusion(%q, %at), kind=kLoop, calls=%look
  ROOT %r = f32[9,4] fusion(%p, %at, %l), kind=kInput, calls=%put
}
"""
    rows, index = 2 * 4 * 4, 2 * 4
    assert hlo.Module(text).traffic == 2 * (2 * rows + index)


def test_what_rests_in_the_hosts_memory_is_counted_apart_from_the_devices_traffic() -> None:
    """A layer's row is put into a stack on the host, a moment is read there by a kernel and copied back to it."""
    text = """HloModule m

%put (s: f32[12,64], r: f32[1,64], i: s32[]) -> f32[12,64] {
  %s = f32[12,64]{1,0:S(5)} parameter(0)
  %r = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[12,64]{1,0:S(5)} dynamic-update-slice(%s, %r, %i, %i)
}

%update (m: f32[256], g: f32[256]) -> f32[256] {
  %m = f32[256]{0:S(5)} parameter(0)
  %g = f32[256]{0} parameter(1)
  ROOT %sum = f32[256]{0} add(%m, %g)
}

ENTRY %main (moment: f32[256], gradient: f32[256], row: f32[1,64], at: s32[]) -> f32[256] {
  %moment = f32[256]{0:S(5)} parameter(0)
  %gradient = f32[256]{0} parameter(1)
  %row = f32[1,64]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %room = f32[12,64]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %stack = f32[12,64]{1,0:S(5)} fusion(%room, %row, %at), kind=kLoop, calls=%put
  %new = f32[256]{0} fusion(%moment, %gradient), kind=kLoop, calls=%update
  %back = (f32[256]{0:S(5)}, f32[256]{0}, u32[]) copy-start(%new)
  ROOT %done = f32[256]{0:S(5)} copy-done(%back)
}
"""
    module = hlo.Module(text)
    assert module.host_traffic == 64 * 4 + 256 * 4 + 256 * 4
    # The row is read, with its index; the gradient is read and the new moment written, and read again to be copied.
    assert module.traffic == 64 * 4 + 4 + 2 * 256 * 4 + 256 * 4
    assert module.kernels == 3


BETWEEN = """HloModule jit_f

ENTRY %main (p: bf16[1,768], q: f32[64]) -> f32[64] {
  %p = bf16[1,768]{1,0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %after = token[] after-all()
  %send = (bf16[1,768]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}, token[]) send(%p, %after), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,3}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %recv = (bf16[2,768]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}, token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,3}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %send.1 = (f32[64]{0}, u32[]{:S(2)}, token[]) send(%q, %after), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %reduce = ((f32[64]{0}), f32[64]{0}) all-reduce-start(%q), replica_groups={{0,8}}, to_apply=%add
  ROOT %done = f32[64]{0} all-reduce-done(%reduce)
}
"""  # noqa: E501


def test_what_slices_of_tpus_exchange_by_their_hosts_is_a_collective() -> None:
    """Of four slices, as replica 2 × data 2, of four chips each."""
    module = hlo.Module(BETWEEN, {"replica": 2, "data": 2, "fsdp": 4}, {"replica": 2, "data": 2, "fsdp": 1})
    assert [(c.kind, c.axes, c.ways, c.bytes, c.sent) for c in module.collectives] == [
        ("all-gather", ("replica",), 2, 2 * 1536, 1536), ("all-reduce", ("replica", "data"), 4, 256, 384),
        ("all-reduce", ("replica",), 2, 256, 256),
    ]  # fmt: skip


def test_kernels_under_which_something_travels() -> None:
    """Counted are those between its beginning and its end, in what is wrapped and runs beside others too."""
    text = """HloModule jit_f, is_scheduled=true

%wrapped (w0: f32[64]) -> f32[16] {
  %w0 = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%w0), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

%called (c0: f32[16]) -> f32[64] {
  %c0 = f32[16]{0} parameter(0)
  ROOT %far = f32[64]{0} all-to-all(%c0), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (p: f32[16], q: f32[64]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %ag-start = (f32[16]{0}, f32[64]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %one = f32[64]{0} fusion(%q), kind=kLoop, calls=%f
  %view = f32[64]{0} bitcast(%one)
  %rs-start = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%view), calls=%wrapped
  %two = f32[64]{0} custom-call(%one), custom_call_target="m"
  %ag-done = f32[64]{0} all-gather-done(%ag-start)
  %rs-done = f32[16]{0} async-done(%rs-start), calls=%wrapped
  %call = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %three = f32[64]{0} fusion(%two), kind=kLoop, calls=%f
  %update = ((f32[16]{0}), f32[64]{0}) call-update(%call, %p)
  %four = f32[64]{0} fusion(%three), kind=kLoop, calls=%f
  %call-done = f32[64]{0} call-done(%update)
  %ar = f32[16]{0} all-reduce(%rs-done), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %last = f32[64]{0} add(%ag-done, %two)
}
"""
    found = {c.kind: c.under for c in hlo.Module(text, {"fsdp": 4}).collectives}
    assert found == {"all-gather": 2, "reduce-scatter": 1, "all-to-all": 2, "all-reduce": 0}
