"""Rankings of many prompts at once, against the same prompts one by one with the server's own functions."""

from __future__ import annotations

import pytest
import torch

from claa_sglang.config.budget import kept_count
from claa_sglang.offline.calibrate import ordering
from claa_sglang.offline.calibrate.evidence import Evidence, Kept, together
from claa_sglang.offline.calibrate.gather import gather, ranker_of
from claa_sglang.offline.calibrate.ranker_list import RANKERS, read
from claa_sglang.offline.records import Subject
from claa_sglang.offline.study import PromptStudy
from claa_sglang.ranking.carry import carry, places
from claa_sglang.ranking.selection import by_rank, select
from claa_sglang.ranking.spec import RankerSpec

LAYERS, HEADS, WINDOW = 5, 2, 8
RATES = [0.01, 0.1, 0.2, 0.5, 1.0]
TOKENS = (211, 90, 211)


def rankings(seed: int, counts: tuple[int, ...]) -> torch.Tensor:
    """fp32 [P, M] with ties, zeros of both signs, infinities and NaN, padded with -inf."""
    rng = torch.Generator().manual_seed(seed)
    rows = (8 * torch.randn(len(counts), max(counts), generator=rng)).round() / 4
    rows[0, :6] = torch.tensor([torch.nan, -torch.inf, torch.inf, -0.0, 0.0, torch.nan])
    for row, count in zip(rows, counts, strict=True):
        row[count:] = -torch.inf
    return rows


@pytest.mark.parametrize("loss", [0.01, 0.02, 0.5, None])
def test_all_prompts_at_once_carry_what_one_does(loss: float | None) -> None:
    counts = (300, 17, 1, 299)
    rows = rankings(1, counts)
    by_rank = ordering.strengths(torch.tensor(counts), rows.shape[1])
    found = ordering.carried(rows, loss, by_rank, torch.tensor(counts))
    for row, one, count in zip(found, rows, counts, strict=True):
        assert torch.equal(row[:count], places(one[:count]) if loss is None else carry(one[:count], loss))
        assert (row[count:] == -torch.inf).all()


def test_keys_stand_in_the_order_of_a_ranking() -> None:
    rows = rankings(2, (64, 64))
    order = ordering.positions(ordering.ascending(ordering.keys(rows)))
    for row, found in zip(rows, order, strict=True):
        assert torch.equal(found, by_rank(row))


def studied(tokens: int, seed: int) -> PromptStudy:
    rng = torch.Generator().manual_seed(seed)
    names = ("window_peak", "window_mass", "last_mass")
    statistics = {name: torch.rand(LAYERS, HEADS, tokens - WINDOW, generator=rng).pow(4) for name in names}
    about = Subject(
        kind="study", model="made up", fingerprint="f" * 64, prompt=f"{seed:064}", tokens=tokens,
        options={"window": WINDOW},
    )  # fmt: skip
    return PromptStudy(about, statistics, torch.rand(tokens, generator=rng), ())


STUDIES = [studied(tokens, seed) for seed, tokens in enumerate(TOKENS)]


def marked(tokens: int, *positions: int) -> torch.Tensor:
    return torch.isin(torch.arange(tokens), torch.tensor(positions))


# One of them in the window, one the first token; nothing known of the last.
NEEDED = [marked(TOKENS[0], 0, 40, 41, 42, 120, 209), marked(TOKENS[1], 30, 31), marked(TOKENS[2])]
OTHERS = ("claa:heads=sum", "claa:zscore=off,carry=0.1", "claa:queries=sum", "last-query:carry=0")
SPECS = read([*RANKERS, *OTHERS])
SCORED = [0, 2, 3]


def evidence(*specs: RankerSpec) -> Evidence:
    return gather(STUDIES, NEEDED, TOKENS, 0.2, specs)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_evidence_keeps_what_select_keeps(spec: RankerSpec) -> None:
    found = evidence(spec)
    kept = found.kept(found.ranking(spec, SCORED), RATES)
    for p, (study, needed) in enumerate(zip(STUDIES, NEEDED, strict=True)):
        n, ranking = study.tokens, study.rank(ranker_of(spec), SCORED)
        oracle = select(study.oracle[:-WINDOW], n, kept_count(n, 0.2, WINDOW), WINDOW)
        for r, rate in enumerate(RATES):
            ours = select(ranking, n, kept_count(n, rate, WINDOW), WINDOW)
            share = float(study.oracle[ours].sum() / study.oracle[oracle].sum())
            assert float(kept.mass[r, p]) == pytest.approx(share, rel=1e-4)
            if needed.any():
                assert float(kept.recall[r, p]) == pytest.approx(float(needed[ours].sum() / needed.sum()))
                assert float(kept.whole[r, p]) == float(needed[ours].sum() == needed.sum())
        if needed.any():
            enough = next(
                count
                for count in range(WINDOW, n + 1)
                if needed[select(ranking, n, count, WINDOW)].sum() == needed.sum()
            )
            assert float(kept.least[p]) == pytest.approx(enough / n)
    assert kept.recall[:, 2].isnan().all() and kept.whole[:, 2].isnan().all() and kept.least[2].isnan()
    assert kept.whole[-1, :2].tolist() == [1.0, 1.0] and kept.lengths.tolist() == list(TOKENS)


def test_rankers_of_one_family_share_their_folds() -> None:
    found = evidence(*read(RANKERS))
    assert sorted(map(str, found.folds)) == [
        "claa:carry=0",
        "claa:carry=0,kernel=13",
        "claa:last=off,carry=0",
        "claa:paper",
        "last-query:carry=0",
    ]
    with pytest.raises(KeyError):
        found.ranking(read(["claa:kernel=21"])[0], SCORED)


def test_an_answer_of_which_a_first_step_dropped_a_token_is_never_whole_again() -> None:
    spec = read(["claa"])[0]
    found = evidence(spec)
    first = found.positions(found.ranking(spec, SCORED), 0.5)
    for p, study in enumerate(STUDIES):
        n = study.tokens
        ours = select(study.rank(ranker_of(spec), SCORED), n, kept_count(n, 0.5, WINDOW), WINDOW)
        assert torch.equal(first[p], ours[:-WINDOW])
    # The second step ranks by position, so that it keeps the last of what is left.
    drop = [torch.tensor([i for i in row.tolist() if i != 41]) for row in first]
    scores = [torch.arange(len(row)).float().expand(1, LAYERS, -1) for row in drop]
    later = found.after(drop, spec, scores)
    kept = later.kept(later.ranking(spec, [1]), [0.5])
    assert kept.whole[0, 0] == 0 and kept.least[0] == torch.inf
    there = int(torch.isin(drop[0], torch.tensor([0, 40, 42, 120])).sum()) + 1
    assert float(kept.recall[0, 0]) == pytest.approx(there / 6)
    assert (kept.mass <= found.kept(found.ranking(spec, SCORED), [0.5]).mass + 1e-5).all()


def test_prompts_of_several_sources_are_judged_together() -> None:
    spec = read(["claa"])[0]
    found = evidence(spec)
    one = found.kept(found.ranking(spec, SCORED), RATES)
    both: Kept = together([one, one])
    assert both.mass.shape == (len(RATES), 6) and both.least.shape == both.lengths.shape == (6,)
    assert torch.equal(both.row(1).mass, torch.cat([one.mass[1], one.mass[1]])[None])


@pytest.mark.gpu
def test_a_gpu_keeps_the_same() -> None:
    specs = read(RANKERS)
    ours, theirs = evidence(*specs), gather(STUDIES, NEEDED, TOKENS, 0.2, specs, "cuda")
    for spec in specs:
        kept = [one.kept(one.ranking(spec, SCORED), RATES) for one in (ours, theirs)]
        for name, on_cpu, on_gpu in zip(Kept._fields, *kept, strict=True):
            torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-4, atol=1e-6, equal_nan=True, msg=f"{spec}: {name}")
