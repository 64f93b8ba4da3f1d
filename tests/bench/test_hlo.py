"""Reading compiled programs: instructions that hold line breaks, bytes of collectives."""

from bench.hlo import operations, schedule

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


FUSED = """HloModule m

%start_of (p: bf16[96,768]) -> (bf16[96,768], bf16[3072,768], u32[]) {
  %p = bf16[96,768]{1,0} parameter(0)
  %all-gather.85 = bf16[3072,768]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
  ROOT %custom-call.3 = (bf16[96,768]{1,0}, bf16[3072,768]{1,0}, u32[]) custom-call(%all-gather.85), custom_call_target="AsyncStart"
}

%async_collective_fusion.64 (p: bf16[96,768], q: bf16[3072,768], x: f32[8,8]) -> (f32[8,8], bf16[96,768], bf16[3072,768]) {
  %p = bf16[96,768]{1,0} parameter(0)
  %q = bf16[3072,768]{1,0} parameter(1)
  %x = f32[8,8]{1,0} parameter(2)
  %all-gather.86 = bf16[3072,768]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
  %dot = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[8,8]{1,0}, bf16[96,768]{1,0}, bf16[3072,768]{1,0}) tuple(%dot, %p, %all-gather.86)
}

%done_of (p: bf16[96,768], q: bf16[3072,768]) -> bf16[3072,768] {
  %p = bf16[96,768]{1,0} parameter(0)
  %q = bf16[3072,768]{1,0} parameter(1)
  %all-gather.87 = bf16[3072,768]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
  ROOT %custom-call.5 = bf16[3072,768]{1,0} custom-call(%q, %all-gather.87), custom_call_target="AsyncDone"
}

ENTRY %main (a: bf16[96,768], x: f32[8,8]) -> bf16[3072,768] {
  %a = bf16[96,768]{1,0} parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %async-collective-start.2 = (bf16[96,768]{1,0}, bf16[3072,768]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%start_of
  %g0 = bf16[96,768]{1,0} get-tuple-element(%async-collective-start.2), index=0
  %g1 = bf16[3072,768]{1,0} get-tuple-element(%async-collective-start.2), index=1
  %fusion.64 = (f32[8,8]{1,0}, bf16[96,768]{1,0}, bf16[3072,768]{1,0}) fusion(%g0, %g1, %x), calls=%async_collective_fusion.64
  %g2 = bf16[96,768]{1,0} get-tuple-element(%fusion.64), index=1
  %g3 = bf16[3072,768]{1,0} get-tuple-element(%fusion.64), index=2
  ROOT %async-collective-done.2 = bf16[3072,768]{1,0} fusion(%g2, %g3), kind=kCustom, calls=%done_of
}
"""


def test_a_gather_that_runs_beside_a_product_is_one_and_the_product_is_work():
    """libtpu's form on v5e: three fusions hold the collective, of which the first starts it and the last waits."""
    found = [(op.kind, op.name, op.bytes, op.waits) for op in schedule(FUSED)]
    assert found == [
        ("all-gather-start", "async-collective-start.2", 3072 * 768 * 2, ""),
        ("fusion", "fusion.64", 0, ""),
        ("async-done", "async-collective-done.2", 0, "async-collective-start.2"),
    ]
