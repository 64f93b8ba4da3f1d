"""The walk through a schedule: busy MXUs, sizes of DMAs, divisions, and long runs of plain bundles."""

from pathlib import Path

import pytest

from bench import llo


def count(text: str, folder: Path, target: str, bytes_per_cycle: float = 400.0) -> llo.Count:
    file = folder / "final_bundles.txt"
    file.write_text(text)
    return llo.count(file, None, target=target, bytes_per_cycle=bytes_per_cycle)


def products(units: list[int], kind: str = "bf16") -> str:
    """Bundles with one product each, on these MXUs in turn."""
    lines = [f"  {hex(i)}   :  {{ %{i} = vmatmul.{kind}.gmra.mxu{unit} %v1_v1 }}" for i, unit in enumerate(units)]
    return "\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(("target", "kind", "each"), [("v5e", "bf16", 16), ("v5e", "f32", 8), ("v6e", "bf16", 8), ("v3", "f32", 8)])
def test_products_wait_for_an_mxu_that_is_busy(target, kind, each, tmp_path):
    counted = count(products([0] * 400, kind), tmp_path, target)
    assert counted.mxu_busy == 400 * each
    assert counted.bundles == 400
    assert 400 * each - 64 < counted.cycles <= 400 * each
    assert counted.cycles == counted.bundles + counted.mxu_stalls


def test_products_that_take_turns_wait_for_their_own_mxu_alone(tmp_path):
    spread = count(products([i % 4 for i in range(400)]), tmp_path, "v5e")
    assert spread.mxu_busy == 100 * 16
    assert 1600 - 64 < spread.cycles <= 1600
    sparse = products([0] * 20).replace("}", ";; %99 = vdelay 15 }")
    assert count(sparse, tmp_path, "v5e").mxu_stalls == 0


LOOP = """
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s4_s2 = sadd.s32 1, %s2_s1  ;;  %s2_s1 = sphi %s1_s0, %s5_s1 } /* Start region 2 */
   0x2   : > { %7 = vmatmul.bf16.gmra.mxu1 %v1_v1  ;;  %s5_s1 = smov %s4_s2 }
   0x3   : > { %8 = vmatmul.bf16.gmra.mxu1 %v1_v1 }
   0x4   : > { %9 = vmatmul.bf16.gmra.mxu1 %v1_v1 }
   0x5   : > { %p5_p0 = scmp.ge.s32.totalorder %s4_s2, 50 }
   0x6   : > { %6 = sbr.rel (!%p5_p0) target = $region2 }
   0x7   :  { %0 = vnop }
   0x8   :  { %0 = vnop }
   0x9   :  { %0 = vnop }
   0xa   :  { %0 = vnop }
"""


def test_a_loop_keeps_its_mxu_as_busy_as_its_products_are(tmp_path):
    counted = count(LOOP, tmp_path, "v5e")
    assert counted.mxu_busy == 50 * 3 * 16
    assert counted.bundles == 1 + 50 * 10
    assert (
        abs(counted.cycles - counted.mxu_busy) < 64
    )  # a loop body of ten bundles and three products: the MXU is what it waits for


DESCRIPTOR = """
     0   :  { %s9_s9 = smov 20971524 }
   0x1   :  { %1 = sst [smem:[#allocation3 + $0x6]] %s9_s9  ;;  %p7_p7 = pmov 1 }
   0x2   :  { %2 = dma (%p7_p7), [#allocation3] /*
window_bounds: (18, 8, 6)
element_size_in_bytes: 4096 */ }
"""


def test_a_dma_moves_what_its_descriptor_says_and_not_its_window(tmp_path):
    counted = count(DESCRIPTOR, tmp_path, "v3")
    assert (counted.dma_bytes, counted.guessed) == (4 * 1024, 0)
    unknown = count(DESCRIPTOR.replace("%s9_s9 = smov 20971524", "%s9_s9 = sld [smem:[#allocation8]]"), tmp_path, "v3")
    assert (unknown.dma_bytes, unknown.guessed) == (18 * 8 * 6 * 4096, 1)


DIVISION = """
     0   :  { %s3_s3 = smov 197  ;;  %s1_s0 = smov 0 }
   0x1   :  { %19 = sdivrem.u32 %s3_s3, 11 /* kDivAndRem */ }
   0x2   :  { %s6_s6 = spop.drf %19 }
   0x3   :  { %s7_s7 = spop.drf %19 }
   0x4 LB: > { %s4_s2 = sadd.s32 1, %s2_s1  ;;  %s2_s1 = sphi %s1_s0, %s5_s1 } /* Start region 2 */
   0x5   : > { %s5_s1 = smov %s4_s2 }
   0x6   : > { %p5_p0 = scmp.ge.s32.totalorder %s4_s2, %sLIMIT }
   0x7   : > { %6 = sbr.rel (!%p5_p0) target = $region2 }
   0x8   :  { %0 = vnop }
"""


@pytest.mark.parametrize(("limit", "trips"), [("6_s6", 197 // 11), ("7_s7", 197 % 11)])
def test_quotient_and_remainder_of_a_division_are_known(limit, trips, tmp_path):
    assert count(DIVISION.replace("LIMIT", limit), tmp_path, "v3").bundles == 4 + 5 * trips
