"""What a run does: lengths, keep rates, rounds; and what it does when nothing is said."""

from __future__ import annotations

import msgspec

QUESTION, TURN_ANSWER = 64, 16  # tokens of a second turn's question, and of the answer before it
CHAT_ANSWER = 4  # tokens of each answer of the growing chat
DENSE_TOKENS = 33  # tokens of an answer by which dense decoding is timed
DECODE_TOKENS = 129  # tokens that each request of a decoding batch generates
SHORT = 512  # tokens of a short request among long ones: below --claa-min-prompt-tokens, so dense in both engines
MIXED_SHORTS = 6


class Chat(msgspec.Struct, frozen=True):
    """A chat that grows in equal turns from a first prompt of `first` tokens to a last one of `last`."""

    first: int
    last: int
    turns: int


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run does; HELP says what each value is."""

    lengths: list[int]
    dense_lengths: list[int]
    prefix_lengths: list[int]
    mixed_lengths: list[int]
    decode_lengths: list[int]
    burst_lengths: list[int]
    chat: Chat
    keep_rates: list[float]
    chunks: list[int]
    concurrency: list[int]
    decode_batches: list[int]
    decode_room: int
    rounds: int
    warm_rounds: int
    long_rounds: int
    rest: float
    pause: float
    think: float
    pause_lengths: list[int]
    users_lengths: list[int]
    mixed_gap: float
    rates: list[float]
    rate_tokens: int
    rate_requests: int
    tp_size: int = 1
    attention_backend: str = ""
    page_size: int = 0
    kv_cache_dtype: str = ""
    decode_dense_layers: int = -1

    def batches(self, tokens: int) -> list[int]:
        """Batches of prompts of `tokens` that scenario decode takes."""
        return [batch for batch in self.decode_batches if not self.decode_room or batch * tokens <= self.decode_room]


# Options of every engine, as SGLang names them; what is empty is left to SGLang.
OF_EVERY_ENGINE = ("tp_size", "attention_backend", "page_size", "kv_cache_dtype")
HELP: dict[str, str] = {
    "lengths": "prompt tokens, scenario cold",
    "dense_lengths": "prompt tokens, scenario dense",
    "prefix_lengths": "tokens of the first turn, scenario second-turn; of the prompt, scenario shared-prefix",
    "mixed_lengths": "tokens of the long prompt, scenario mixed",
    "decode_lengths": "prompt tokens, scenario decode",
    "burst_lengths": "prompt tokens, scenario burst",
    "chat": "FIRST LAST TURNS: tokens of the first and of the last prompt, scenario growing-chat",
    "keep_rates": "of pruned requests",
    "chunks": "prefill chunks in tokens; each takes engines of its own",
    "concurrency": "requests that arrive together, scenario burst",
    "decode_batches": "requests that decode together, scenario decode",
    "decode_room": "prompt tokens of a batch, at most, scenario decode: wider ones are left out; 0 for any",
    "rounds": "timed rounds",
    "warm_rounds": "rounds before them",
    "long_rounds": "rounds of arrivals, chats with pauses and users, with none before them",
    "rest": "seconds without work before each engine's turn: a GPU that was busy just before is slower",
    "pause": "seconds between an answer and the next question, scenarios after-pause, thinking-chat and pasting-chat",
    "think": "seconds between two questions of a user, scenario users",
    "pause_lengths": "tokens of the first turn, scenario after-pause",
    "users_lengths": "tokens of each user's document, scenario users",
    "mixed_gap": "seconds between two short requests, scenario mixed",
    "rates": "requests per second, scenario rates",
    "rate_tokens": "prompt tokens, scenario rates",
    "rate_requests": "requests at each rate",
    "tp_size": "tensor-parallel ranks of every engine",
    "attention_backend": "of every engine; SGLang's choice if not given",
    "page_size": "tokens of a page, in every engine; SGLang's choice if not given",
    "kv_cache_dtype": "of every engine; the model's if not given",
    "decode_dense_layers": "first layers in which generated tokens read the whole prompt; -1 for all, as by default",
}

# What runs when nothing is said: on a GPU what the targets name, on the CPU engine what takes minutes.
GPU_DEFAULTS = Settings(
    lengths=[10_240, 32_768, 131_072],
    dense_lengths=[10_240],
    prefix_lengths=[32_768],
    mixed_lengths=[32_768],
    decode_lengths=[32_768],
    burst_lengths=[16_384],
    chat=Chat(1024, 32_768, 60),
    keep_rates=[0.2],
    chunks=[8192],
    concurrency=[8],
    decode_batches=[8],
    decode_room=0,
    rounds=5,
    warm_rounds=1,
    long_rounds=1,
    rest=0.0,
    pause=2.0,
    think=5.0,
    pause_lengths=[10_240, 32_768],
    users_lengths=[16_384],
    mixed_gap=0.1,
    rates=[1.0, 2.0, 3.0, 4.0],
    rate_tokens=10_240,
    rate_requests=60,
)
CPU_DEFAULTS = Settings(
    lengths=[1024, 2048, 4096],
    dense_lengths=[1024],
    prefix_lengths=[2048],
    mixed_lengths=[3072],
    decode_lengths=[1024],
    burst_lengths=[1536],
    chat=Chat(256, 3072, 12),
    keep_rates=[0.2],
    chunks=[2048],
    concurrency=[3],
    decode_batches=[3],
    decode_room=0,
    rounds=5,
    warm_rounds=1,
    long_rounds=1,
    rest=0.0,
    pause=4.0,
    think=10.0,
    pause_lengths=[1536],
    users_lengths=[1024],
    mixed_gap=0.3,
    rates=[0.2, 0.4],
    rate_tokens=1536,
    rate_requests=20,
)
