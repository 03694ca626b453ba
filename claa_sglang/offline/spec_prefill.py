"""SpecPrefill's ranking: what a smaller draft model looks at while it begins the answer.

Source: Speculative Prefill, arXiv 2502.02789; Jingyu6/speculative_prefill. Its ranking only: the target model then
prunes as with every other ranker here, and nothing of the draft's own cost is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claa_sglang.offline import records
from claa_sglang.offline.basics import CaptureError
from claa_sglang.offline.capture import greedy_answer
from claa_sglang.offline.oracle import POOL_KERNEL, AnswerAttention

LOOK_AHEAD = 8  # draft tokens, as in the published configuration
CHUNK = 32  # tokens that are kept or dropped together
_KIND = "specprefill"


def require_same_tokenizer(draft: Any, target: Any) -> None:
    """Raise CaptureError unless two transformers tokenizers give every piece the same id.

    The draft is given the target's token ids; with another vocabulary they would be another text.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours != theirs:
        different = sum(theirs.get(piece) != index for piece, index in ours.items())
        raise CaptureError(
            f"the draft model's tokenizer is another one: {different:,} of {len(ours):,} pieces differ, and it has "
            f"{len(theirs):,}; give a smaller model of the same family, which shares the tokenizer"
        )


def importance(draft: Any, input_ids: Tensor, *, look_ahead: int = LOOK_AHEAD, chunk: int = CHUNK) -> Tensor:
    """Importance of every prompt token to the draft's next `look_ahead` tokens, by chunk.

    draft: a transformers causal LM; input_ids: int64 [N]; look_ahead: forwards of the draft, 1 or more, fewer where it
    ends its answer. With p[t, l, h] the softmax over the prompt's keys of step t's query:
        `score = mean over t of max over l, h of pool_13(p[t, l, h])`; every token then has the mean score of its chunk.
    Chunks begin at position 0; the last may be shorter. Of the chunk at the edge of a budget the first tokens are kept.
    Returns fp32 [N] on the CPU.
    """
    observer = AnswerAttention(input_ids.numel(), pool_each=POOL_KERNEL, pool_mean=1)
    greedy_answer(draft, input_ids, observer, max_answer_tokens=look_ahead)
    return torch.cat([part.mean().expand_as(part) for part in observer.importance().split(chunk)])


def load_or_importance(directory: Path, draft: Any, input_ids: Tensor, *, look_ahead: int = LOOK_AHEAD) -> Tensor:
    """`importance` of this prompt from `directory`, or made now and saved there. Raises RecordError for a bad file."""
    about = records.subject(_KIND, draft, input_ids, look_ahead=look_ahead)
    path = directory / about.filename()
    if path.is_file():
        return records.load(path, about)[1]["importance"]
    made = importance(draft, input_ids, look_ahead=look_ahead)
    records.save(path, about, (), {"importance": made})
    return made
