"""Load the model of a study with transformers, and study a set of prompts with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from claa_sglang.offline.basics import CaptureError
from claa_sglang.offline.study import PromptStudy, load_or_study
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.record import Prompt


def load_model(path: str) -> tuple[Any, Any]:
    """Causal LM and tokenizer, by directory or name: on a GPU in bf16 where there is one, else on the CPU in fp32.

    Raises CaptureError with transformers' reason if they cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise CaptureError(f"model {path}: {error} Give a directory with a causal LM and its tokenizer") from error
    return model.to(device).eval(), tokenizer


def study_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], directory: Path, *, window: int, max_answer_tokens: int
) -> Iterator[PromptStudy]:
    """The study of each prompt in order, from `directory` or made now and saved there, with a progress bar.

    Stopped and run again, it goes on where it was. Raises as `load_or_study` does.
    """
    from tqdm import tqdm

    for prompt in tqdm(prompts, desc="studies", unit="prompt"):
        ids = torch.tensor(token_ids(prompt, tokenizer), dtype=torch.int64)
        yield load_or_study(directory, model, ids, window=window, max_answer_tokens=max_answer_tokens)
