"""The roofline of a decoding step: bytes and operations as a person counts them, and the floors that follow."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case, Work, step_cases

# bytes and operations a second, in units of 1e9
H100, H200, MATMULS = 3350.0, 4800.0, 800_000.0


def model(dim, layers, batch, beam, **more):
    """Returns a case in which every head has keys of its own."""
    heads = dim // 64
    return Case("", dim=dim, source_layers=layers, target_layers=layers, heads=heads, kv_heads=heads, vocabulary=512,
                batch=batch, beam=beam, **more)  # fmt: skip


# microseconds in bfloat16: weights, self, cross, the floors of H100 and H200, and what reading cross-attention's keys
# once a beam and copying caches costs on the H100
@pytest.mark.parametrize(
    ("dim", "layers", "batch", "beam", "wanted"),
    [
        (512, 6, 1, 1, (13, 0.4, 2, 15.5, 10.8, 16)),
        (512, 6, 32, 4, (13, 71, 118, 202, 141, 695)),
        (512, 6, 512, 5, (13, 1418, 1880, 3314, 2313, 13_651)),
        (1024, 12, 32, 4, (105, 284, 470, 859, 600, 2833)),
        (1024, 12, 512, 5, (105, 5672, 7520, 13_300, 9282, 54_647)),
    ],
)
def test_floors_of_a_step(dim, layers, batch, beam, wanted):
    case = model(dim, layers, batch, beam, source=500 if batch == 1 else 1000)
    generated = 100 if batch == 1 else 150
    work, copying = case.step(generated), case.step(generated, shared=False)
    found = (
        *(part / H100 / 1e3 for part in (work.weights, work.own, work.cross)),
        work.floor(H100, MATMULS) * 1e6,
        work.floor(H200, MATMULS) * 1e6,
        copying.floor(H100, MATMULS) * 1e6,
    )
    for ours, theirs in zip(found, wanted, strict=True):
        # the known figures are rounded, one of them twice
        assert ours == pytest.approx(theirs, rel=0, abs=0.05 if theirs % 1 else 0.51)
    assert work.bound(H100, MATMULS) == "bandwidth"


@pytest.mark.parametrize(("dim", "layers", "wanted"), [(1024, 12, 2570), (512, 6, 10_300)])
def test_the_floor_of_the_whole_labelling_job(dim, layers, wanted):
    """512 clips of 20 s, as times real time."""
    seconds = model(dim, layers, 512, 5, source=1000, tokens=300).steps_floor(H100, MATMULS)
    assert 512 * 20 / seconds == pytest.approx(wanted, rel=2e-3)


def test_a_step_counts_what_a_person_counts():
    """One layer, one number of everything, two utterances of three beams, after four tokens of a source of five."""
    case = Case("", dim=6, source_layers=1, target_layers=1, heads=1, kv_heads=1, head_dim=1, vocabulary=7, batch=2,
                source=5, beam=3)  # fmt: skip
    weights = 6 * 3 + 3 * 6 + 3 * 6 * 16 + 7 * 6
    attended = 4 * 6 * ((4 + 1) + (5 + 1))
    common = dict(weights=4 * weights, selection=8 * 6 * 7, flops=2 * 6 * weights + attended)
    assert case.step(4, 4) == Work(own=4 * 2 * 15 * 2, cross=4 * 2 * 6 * 2, moved=0, **common)
    assert case.step(4, 4, distinct=5).own == 4 * 2 * 5 * 2
    unshared = case.step(4, 4, shared=False)
    assert unshared == Work(own=4 * 2 * 15 * 2, cross=3 * 4 * 2 * 6 * 2, moved=4 * 2 * 6 * 4 * 2, **common)
    assert case.step(4, 4).floor(1e9, 1.0) == pytest.approx(common["flops"] / 1e9)
    assert case.step(4, 4).bound(1e9, 1.0) == "matmuls"


def test_every_size_has_a_step_and_its_greedy_rival_comes_first():
    names = [case.name for case in step_cases() if "gpu" in case.sets]
    sizes = {"1x1", "32x4", "128x5", "512x5", "640x1"}
    assert set(names) == {f"step {model} {size}" for model in ("512x6", "1024x12") for size in sizes}
    for model_name in ("512x6", "1024x12"):
        assert names.index(f"step {model_name} 640x1") < names.index(f"step {model_name} 128x5")
