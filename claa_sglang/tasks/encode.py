"""From a prompt to the token ids that a model gets, the same for every tool that sends prompts."""

from __future__ import annotations

from typing import Any

from claa_sglang.tasks.record import Prompt


def token_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The ids of `prompt`, with the answer prefix at their end.

    tokenizer: a Hugging Face one. A chat goes through its template, which adds the special tokens; plain text gets the
    special tokens that the tokenizer adds by default; ids are returned as they are.
    """
    if prompt.input_ids is not None:
        return prompt.input_ids
    if prompt.prompt is not None:
        return tokenizer(prompt.prompt + prompt.answer_prefix, verbose=False).input_ids
    chat = [{"role": message.role, "content": message.content} for message in prompt.messages or ()]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text + prompt.answer_prefix, add_special_tokens=False, verbose=False).input_ids
