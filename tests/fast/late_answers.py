"""What a late pass of `late_world` must keep and read, worked out apart from it: plain loops and the naive kernels."""

from __future__ import annotations

import torch

from claa_sglang.kernels import naive
from tests.fast.late_world import LAYERS, POOL_KERNEL, SCALING, WINDOW, Request, World
from tests.naive_rankers import ORACLES, Layer


def kept_positions(world: World, request: Request) -> list[list[int]]:
    """Per step, the prompt positions that go on: they depend on the text and the counts alone, so are computed once."""
    assert request.state is not None
    key = (request.text, request.prompt, request.state.plan.kept_counts)
    if key not in world.answers:
        world.answers[key] = _kept_positions(world, *key)
    return world.answers[key]


def _kept_positions(world: World, text: int, prompt: int, counts: tuple[int, ...]) -> list[list[int]]:
    kept, visible = [], list(range(prompt))
    for step, count in zip(world.config.steps, counts, strict=True):
        if count < len(visible):
            window = visible[-WINDOW:]
            layers = []
            for layer in step.score_layers:
                q = torch.stack([world.queries[layer, text, p] for p in window])
                k = torch.stack([world.keys[layer, text, p] for p in visible])
                layers.append(Layer(q, k))
            ranking = torch.tensor(ORACLES["claa"](layers, SCALING, kernel=POOL_KERNEL))
            chosen = naive.select(ranking, len(visible), count, WINDOW).tolist()
            visible = [visible[i] for i in chosen]
        kept.append(visible)
    return kept


def check(world: World, requests: list[Request]) -> None:
    """Compare what each layer could read in the last forward, and what was kept, with the plain answer."""
    assert world.last is not None
    for request in requests:
        spans = request.state.progress.late_spans if request.state is not None else []
        begun = request.pruned and spans[0][1] > 0
        parted = begun and request.length < request.total  # the last page waits to be computed again
        everything = [(request.text, p) for p in range(request.total if parted else request.length)]
        if begun:
            _check_kept(world, request)
        for layer in range(LAYERS):
            level = sum(layer > step.prune_layer for step in world.config.steps)
            read = world.read[layer].get(request.row)
            generated = world.generated_read[layer].get(request.row)
            if layer in world.config.kept_layers and request.pruned and len(everything) > request.prompt:
                kept = kept_positions(world, request)[0]
                early = [t for t in everything if t[1] in kept or t[1] >= request.prompt]
                in_decode = world.last.plan.decode
                if len(kept) < request.prompt:
                    assert (read, generated) == ((early, None) if in_decode else (everything, early))
                    continue
            assert generated is None
            if level == 0 or not request.pruned:
                assert read == everything
            elif not begun:
                assert read is None  # in the middle of its prompt
            else:
                kept = kept_positions(world, request)[level - 1]
                late = [t for t in everything if t[1] in kept or t[1] >= request.prompt]
                start, end = (0, len(late)) if request.decodes else spans[level - 1]
                assert read == (late[:end] if end > start else None)


def _check_kept(world: World, request: Request) -> None:
    """A step's ranking is there, and right, as soon as the rows before it are complete."""
    state, plain = request.state, kept_positions(world, request)
    assert state is not None and state.progress.late_computed_tokens == len(plain[0])
    for step, kept in enumerate(state.progress.kept):
        before = step - 1
        complete = step == 0 or state.progress.late_spans[before][1] >= state.plan.kept_counts[before]
        assert kept is not None or not complete
        assert kept is None or kept.tolist() == plain[step]
