"""Reading compiled programs: instructions that hold line breaks, bytes of collectives."""

from bench.hlo import operations

BROKEN = """HloModule m

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %call.1 = bf16[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/one/pallas_call"}
  %after = bf16[8,128]{1,0} fusion(%call.1), kind=kLoop, backend_config={"window_config":{"estimated_cycles":"50"}}
  ROOT %two.1 = bf16[8,128]{1,0} custom-call(%after), custom_call_target="tpu_custom_call", metadata={op_name="f/two/pallas_call"}
}
"""


def test_an_instruction_may_hold_line_breaks():
    found = operations(BROKEN)
    assert [(op.kernel, op.kind, op.cycles) for op in found if op.kind == "kernel"] == [("one", "kernel", 0), ("two", "kernel", 0)]
    assert sum(op.cycles for op in found) == 50


SLICES = """HloModule m

%change (p: f32[12,8,128], q: f32[1,8,128], i: s32[]) -> f32[12,8,128] {
  %p = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %q = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  ROOT %d = f32[12,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p, %q, %i)
}

%take (p: f32[12,8,128], i: s32[]) -> f32[1,8,128] {
  %p = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %d = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,128}
}

ENTRY %main (a: f32[12,8,128], b: f32[1,8,128], i: s32[]) -> f32[12,8,128] {
  %a = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %taken = f32[1,8,128]{2,1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%take
  %whole = f32[12,8,128]{2,1,0:T(8,128)} copy(%a)
  ROOT %changed = f32[12,8,128]{2,1,0:T(8,128)} fusion(%whole, %b, %i), kind=kLoop, calls=%change
}
"""


def test_fusions_that_slice_move_their_slices_alone():
    found = {op.name: op.moved for op in operations(SLICES)}
    assert found == {"taken": 2 * 4096, "whole": 2 * 12 * 4096, "changed": 2 * 4096}


COLLECTIVES = """HloModule m

ENTRY %main (a: bf16[8,128]) -> f32[16,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %f = f32[16,128]{1,0} parameter(1)
  %gathered = bf16[32,128]{1,0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %started = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = bf16[32,128]{1,0} all-gather-done(%started)
  %scattered = f32[4,128]{1,0} reduce-scatter(%f), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
  ROOT %both = (f32[16,128]{1,0}, bf16[8,128]{1,0}) all-reduce(%f, %a), replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""


def test_bytes_of_a_collective_are_those_of_its_larger_side():
    found = {op.name: op.bytes for op in operations(COLLECTIVES)}
    assert found == {
        "gathered": 32 * 128 * 2,
        "started": 32 * 128 * 2,
        "scattered": 16 * 128 * 4,
        "both": 16 * 128 * 4 + 8 * 128 * 2,
    }
