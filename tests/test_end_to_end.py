"""Through real forward, backward and reduction: as close to one process as another order of summation comes."""

from __future__ import annotations

import pytest
from end_to_end import PLACEMENTS, RUNS, Run, measure

from dist_optim.testing import RankPool

FACTOR = 2.0
"""The floor is the largest of five samples, so a sixth may lie above it; a defect lies orders of magnitude above."""


def check(pool: RankPool, run: Run, placements: list[str]) -> None:
    measured = pool.run(measure, run, placements)[0]
    # Muon orthogonalises in bf16, which alone is worth 2e-2; methods that keep only signs may have no noise at all.
    # SOAP begins from eigenvectors of matrices without full rank, which any rounding turns: see its parity.
    limit = 1.0 if run.name == "soap" else 3e-2
    assert 0 <= measured.floor < limit, "a floor that is no rounding noise would hide anything"
    problems = {place: far for place, far in measured.distances.items() if not far <= FACTOR * measured.floor}
    assert not problems, f"farther from one process than the noise floor of {measured.floor:.2e}: {problems}"


@pytest.mark.parametrize("run", RUNS[::4], ids=str)  # `make parity` measures all; test_parity_docs checks what it found
def test_stays_within_the_noise_floor_of_one_process(run: Run, four_ranks: RankPool) -> None:
    check(four_ranks, run, list(PLACEMENTS)[RUNS.index(run) // 4 % 2 :: 2])


@pytest.mark.parametrize("run", [run for run in RUNS if run.name in ("galore_adamw", "schedule_free_adamw")], ids=str)
def test_stays_within_the_noise_floor_on_three_ranks(run: Run, three_ranks: RankPool) -> None:
    check(three_ranks, run, [place for place in PLACEMENTS if place != "hsdp"])
