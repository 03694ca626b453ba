"""A tokenizer for the tiny models: stop strings, schemas and texts need one, and random weights do not mind which.

Byte level: one token per byte, then pairs of letters that no text is ever encoded to but that a model may generate,
and an end mark. Exactly the vocabulary of the tiny models, so every token they generate has a text.
"""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tests.tiny_models import VOCAB_SIZE

EOS = "<eos>"
EOS_ID = VOCAB_SIZE - 1
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def add(model: Path, home: Path) -> Path:
    """A copy of the tiny model in directory `model`, under `home`, that has this tokenizer and a chat template; made
    unless it is there."""
    directory = home / f"{model.name}-bytes"
    if not directory.is_dir():
        temp = home / f".{directory.name}"
        shutil.rmtree(temp, ignore_errors=True)
        shutil.copytree(model, temp)
        _tokenizer().save_pretrained(temp)
        temp.rename(directory)
    return directory


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    tokens = [*alphabet, *pairs[: EOS_ID - len(alphabet)], EOS]
    assert len(tokens) == VOCAB_SIZE
    # No merges: encoding stays one token per byte.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
