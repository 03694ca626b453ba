"""Every model family: dense and keep rate 1 are the model itself, and a pruned answer is the reference's.

Each family runs with other settings (prune layer, scored layers, window, pool kernel), so that no setting is only ever
tested at its default; one family of each residual convention prunes twice. Cold, chunked (the prompts are longer than a
chunk) and on a prefix hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from claa_sglang.config import profile_search
from tests import profiles, tiny_models
from tests.answers import ONE_THREAD, STRICT, TINY_FLAGS, Answer, Ask, ask, check, check_idle
from tests.engine_server import Server, server
from tests.reference_model import Later, ReferenceModel
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.engine

PROMPT, CHUNK = 300, 64  # the shared server, which serves llama, has chunks of 256
HIT_BOUND = 5e-5  # log probabilities; seen: 1.6e-5
KEEP_RATES = (0.1, 0.35, 0.8)
FIRST_RATE = 0.25  # of schedules; requests ask for their own


@dataclass(frozen=True)
class Settings:
    prune_layer: int
    score_layers: tuple[int, ...]
    window: int
    pool_kernel: int
    later: tuple[Later, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        if self.later:
            prunes = [Later(self.prune_layer, self.score_layers, 1.0), *self.later]
            steps = [f"{p.prune_layer}:{FIRST_RATE**p.power}:{'+'.join(map(str, p.score_layers))}" for p in prunes]
            prune = ("--claa-schedule", ",".join(steps))
        else:
            scored = "".join(f"{i}," for i in self.score_layers)
            prune = ("--claa-prune-layer", str(self.prune_layer), "--claa-score-layers", scored)
        return (
            *prune,
            *("--claa-window", str(self.window)),
            *("--claa-pool-kernel", str(self.pool_kernel)),
        )


SETTINGS = {  # llama runs with the defaults
    "mistral": Settings(3, (1, 3), 4, 5),
    "qwen2": Settings(6, (4,), 16, 1),  # room for the sum of a boundary state alone
    "qwen3": Settings(1, (0, 1), 1, 3, (Later(4, (3, 4), 1.7),)),
    "granite": Settings(3, (2, 3), 8, 7, (Later(5, (5,), 1.5),)),
    "gemma": Settings(2, (0, 2), 5, 9),
}


@dataclass(frozen=True)
class Family:
    name: str
    server: Server
    reference: ReferenceModel


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    name = request.param
    if name == "llama":
        yield Family(name, request.getfixturevalue("llama_server"), request.getfixturevalue("llama_reference"))
        return
    settings = SETTINGS[name]
    path = tiny_model(name)
    reference = ReferenceModel(path, **vars(settings))
    if name == "gemma":  # SGLang 0.5.23 computes gemma's GELU exactly, transformers by the tanh approximation
        for layer in reference.model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
    flags = ("--enable-claa", "--claa-policy", "always", *settings.flags, "--claa-min-prompt-tokens", "0", *TINY_FLAGS)
    # A profile without values: what SGLang made of the weights must be known again.
    found = {profile_search.VARIABLE: str(profiles.write(tmp_path_factory.mktemp(name) / "p.json", path).parent)}
    with server(path, *flags, "--chunked-prefill-size", str(CHUNK), env=STRICT | ONE_THREAD | found) as running:
        assert running.log().count("(auto: calibrated for this user): measured on these weights") == 1
        yield Family(name, running, reference)


def cold_and_hit(running: Server, asked: Ask) -> tuple[Answer, Answer]:
    """The answer with an empty cache, and again right after."""
    running.flush()
    cold, hit = ask(running, asked, VOCAB_SIZE), ask(running, asked, VOCAB_SIZE)
    assert cold.cached == 0 and hit.cached > len(asked.prompt) - 2 * CHUNK
    return cold, hit


def test_dense_is_the_model(family: Family) -> None:
    prompt = tiny_models.prompt(PROMPT, seed=1)
    for answer in cold_and_hit(family.server, Ask(prompt)):
        check(answer, family.reference.dense(prompt, answer.tokens))


def test_keeping_everything_is_dense(family: Family) -> None:
    """Bit for bit, but on a hit: there the late layers compute all rows at once, and dense ones only the last few."""
    prompt = tiny_models.prompt(PROMPT, seed=2)
    dense = cold_and_hit(family.server, Ask(prompt))
    everything = cold_and_hit(family.server, Ask(prompt, keep=1.0))
    for d, e, bound in zip(dense, everything, (0.0, HIT_BOUND), strict=True):
        assert e.report["pruned"] and all(kept == list(range(PROMPT)) for kept in e.kept_by_step)
        assert e.tokens == d.tokens
        assert d.logprobs is not None and e.logprobs is not None
        difference = (e.logprobs - d.logprobs).abs().max().item()
        print(f"{family.name}: keep rate 1 against dense: {difference:.1e}")  # with pytest -s
        assert difference <= bound


@pytest.mark.parametrize("keep", KEEP_RATES)
def test_pruned_is_the_reference(family: Family, keep: float) -> None:
    prompt = tiny_models.prompt(PROMPT, seed=3)
    for answer in cold_and_hit(family.server, Ask(prompt, keep=keep)):
        assert answer.report["pruned"]
        check(answer, family.reference.pruned(prompt, answer.tokens, keep))


def test_a_pruned_answer_is_another_answer(family: Family) -> None:
    """Else the test above says little: a prune that does nothing would pass at every keep rate."""
    prompt = tiny_models.prompt(PROMPT, seed=3)
    pruned, dense = (ask(family.server, Ask(prompt, keep=k), VOCAB_SIZE).logprobs for k in (KEEP_RATES[0], None))
    assert pruned is not None and dense is not None
    assert (pruned[0] - dense[0]).abs().max() > 0.1
    assert torch.isfinite(pruned).all()


def test_nothing_is_left(family: Family) -> None:
    check_idle(family.server)
