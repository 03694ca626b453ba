"""What layers after a prune see, against the layers run one by one with eager attention; and needles in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from claa_sglang.offline.calibrate.late_scores import late_statistic
from claa_sglang.offline.samples import sample
from claa_sglang.offline.study import study
from claa_sglang.ranking.rankers import Statistic
from claa_sglang.tasks.record import Message, Prompt
from tests import tiny_models

WINDOW, TOKENS, PRUNE, LAST = 11, 61, 3, 6
FAMILIES = ("llama", "qwen3", "granite", "gemma")


def load(home: Path, family: str, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    directory = tiny_models.build(family, home)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)


def naive(model: Any, ids: torch.Tensor, kept: torch.Tensor, statistic: str) -> torch.Tensor:
    """[layers, kv_heads, kept]: a statistic of the window's attention, rows dropped by hand after layer PRUNE."""
    rows = torch.cat((kept, torch.arange(TOKENS - WINDOW, TOKENS)))
    weights: list[torch.Tensor] = []
    late = model.model.layers[PRUNE + 1 : LAST + 1]
    hooks = [layer.self_attn.register_forward_hook(lambda _m, _a, out: weights.append(out[1][0])) for layer in late]
    with torch.no_grad():
        hidden = model(ids[None], output_hidden_states=True).hidden_states[PRUNE + 1]
        weights.clear()
        cosine, sine = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
        hidden = hidden[:, rows]
        mask = torch.full((len(rows), len(rows)), torch.finfo(torch.float32).min).triu(1)[None, None]
        for layer in late:
            rotary = (cosine[:, rows], sine[:, rows])
            out = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=rows[None])
            hidden = out[0] if isinstance(out, tuple) else out
    for hook in hooks:
        hook.remove()
    window = torch.stack(weights)[:, :, -WINDOW:, : len(kept)].unflatten(1, (2, -1))
    if statistic == "window_peak":
        return window.amax(dim=(2, 3))
    return (window[..., -8:, :] if statistic == "window_mass" else window[..., -1:, :]).sum(dim=(2, 3))


@pytest.mark.parametrize(
    ("family", "statistic"),
    [("llama", "window_mass"), ("llama", "last_mass"), *((one, "window_peak") for one in FAMILIES)],
)
def test_layers_after_the_prune_see_kept_tokens_at_their_own_positions(
    family: str, statistic: Statistic, tmp_path: Path
) -> None:
    ids = torch.tensor(tiny_models.prompt(TOKENS))
    kept = torch.tensor([0, 3, 4, 9, 17, 30, 31, 32, 45, 49])
    model = load(tmp_path, family, "sdpa")
    where = {"prune_layer": PRUNE, "last_layer": LAST, "window": WINDOW}
    found = late_statistic(model, ids, kept, statistic, **where)
    eager = naive(load(tmp_path, family, "eager"), ids, kept, statistic)
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-5)

    dense = study(model, ids, window=WINDOW, max_answer_tokens=1).statistics[statistic][PRUNE + 1 : LAST + 1]
    assert (found - dense[:, :, kept]).abs().max() > 1e-2  # it matters that the others are gone
    everything = late_statistic(model, ids, torch.arange(TOKENS - WINDOW), statistic, **where)
    torch.testing.assert_close(everything, dense, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer(small_model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model_path)


TEXT = "A wall is grey. The code of Köln is 4711. The sky is “blue”. The code of Rome is 753. What is Köln's code?"
NEEDLES = {"needles": ["The code of Köln is 4711.", "The code of Rome is 753."]}


def marked(one: Any, answer: str, tokenizer: Any) -> str:
    return tokenizer.decode(one.input_ids[one.used(answer)])


@pytest.mark.parametrize("form", ["messages", "prompt", "input_ids"])
def test_a_needle_is_the_tokens_of_an_answer_the_model_gave(form: str, tokenizer: Any) -> None:
    ids = tokenizer(TEXT).input_ids
    text = {"messages": [Message("user", TEXT)], "prompt": TEXT, "input_ids": ids}[form]
    one = sample(Prompt(**{form: text}, answers=["4711"], **NEEDLES), tokenizer)
    assert marked(one, "It is 4711.", tokenizer) == "4711"
    assert marked(one, "It is 753.", tokenizer) == ""  # a failure of the model is none of the prune

    two = sample(Prompt(**{form: text}, answers=["4711", "753"], **NEEDLES), tokenizer)
    assert marked(two, "753, 4711", tokenizer) == "4711753" and marked(two, "753", tokenizer) == "753"

    whole = sample(Prompt(**{form: text}, **NEEDLES), tokenizer)
    assert marked(whole, "", tokenizer) == " The code of Köln is 4711. The code of Rome is 753."


def test_what_cannot_be_located_is_not_counted(tokenizer: Any) -> None:
    assert sample(Prompt(prompt=TEXT), tokenizer).needles == ()
    assert sample(Prompt(prompt=TEXT, needles=["not in it"]), tokenizer).needles == ()
    letters = [tokenizer(letter).input_ids[0] for letter in "The code"]  # ids no tokenizer would make of this text
    assert sample(Prompt(input_ids=letters, needles=["code"]), tokenizer).needles == ()
