"""Prompts of `claa-sglang tasks` with a number to find, where the model's tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.generate import TaskError, generate
from claa_sglang.tools.ask_error import one_line
from claa_sglang.verify.error import VerifyError
from claa_sglang.verify.prompts import Needle

TASK = "needle-number"
SOURCES = ("prose", "repeated")  # the first that is here
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def tokenizer_at_hand(named: str | None, model_info: Mapping[str, Any]) -> Any:
    """A Hugging Face tokenizer: the one that is named, or the server's if its folder is on this machine; else None.

    Raises VerifyError for a named one that cannot be loaded.
    """
    home = named or str(model_info.get("tokenizer_path") or model_info.get("model_path") or "")
    here = any(Path(home, name).is_file() for name in _FILES)
    if named and not here and (Path(home).is_absolute() or Path(home).exists()):
        raise VerifyError(f"--tokenizer {named} cannot be loaded: it has none of {', '.join(_FILES)}")
    if not named and not here:
        return None
    from transformers import AutoTokenizer  # seconds

    try:
        return AutoTokenizer.from_pretrained(home)
    except Exception as error:  # noqa: BLE001
        if named:
            raise VerifyError(f"--tokenizer {named} cannot be loaded: {one_line(str(error))}") from error
        return None


def task_needles(tokenizer: Any, tokens: int, count: int) -> list[Needle]:
    """Prompts of at most `tokens` tokens, the same in every run; none where they cannot be made here."""
    for source in SOURCES:
        try:
            made = list(generate(tokenizer, [TASK], [tokens], [source], count))
        except TaskError:
            continue
        return [
            Needle({"input_ids": token_ids(prompt, tokenizer)}, prompt.answers, prompt.max_new_tokens or 32)
            for prompt in made
        ]
    return []
