"""The command: a plan, the requests with their progress, a table, a record and an exit status."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from typing import Any

from tqdm import tqdm

from claa_sglang.verify import claims, plan, report, ttft
from claa_sglang.verify.asking import Keys, ask_pair
from claa_sglang.verify.claims import Claim
from claa_sglang.verify.client import DENSE, PRUNED, Client
from claa_sglang.verify.compare import Noise, noise_of
from claa_sglang.verify.error import VerifyError
from claa_sglang.verify.needles import task_needles, tokenizer_at_hand
from claa_sglang.verify.prompts import Ids, Prompts, Texts

SAMPLE_WORDS = 600
INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """0 if no claim failed, else 1; 130 where it was interrupted. Raises VerifyError, and OSError for --out."""
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.open("a").close()  # before anything is asked
    name = secrets.token_hex(4)
    client = Client(args.url, args.api_key, args.timeout)
    info = client.server_info()
    planned, noise = plan.make(args, info), noise_of(info)
    print("\n".join([f"{client.url}: {info['model_path']}", *planned.lines]), file=sys.stderr)
    try:
        found = _claims(client, info, planned, noise, args, name)
    except (KeyboardInterrupt, VerifyError) as stop:
        if client.cost.requests:
            print("\n".join(client.cost.lines(planned.pool)), file=sys.stderr)
        if isinstance(stop, VerifyError):
            raise
        return INTERRUPTED
    print("\n".join([*report.table(found), "", *report.summary(found, noise), *client.cost.lines(planned.pool)]))
    if args.out is not None:
        made = report.record(_command(args), info, planned, noise, found, client.cost)
        args.out.write_text(json.dumps(made, indent=1) + "\n")
    return int(any(claim.ok is False for claim in found))


def _claims(
    client: Client, info: dict[str, Any], planned: plan.Plan, noise: Noise, args: argparse.Namespace, name: str
) -> list[Claim]:
    keys = Keys(name)
    tokenizer = tokenizer_at_hand(args.tokenizer, client.model_info()) if planned.needles else None
    with tqdm(total=planned.requests, desc="verify", unit="request", file=sys.stderr) as progress:
        client.asked = progress.update
        prompts = _prompts(client, info, keys, name)
        _must_prune(client, keys, prompts, planned.tokens)
        asked = []
        for number in range(1, planned.prompts + 1):
            progress.set_description(f"answers, prompt {number} of {planned.prompts}")
            asked.append(ask_pair(client, keys, prompts.pair(planned.tokens), planned.replicas))
        progress.set_description("needles")
        made = task_needles(tokenizer, planned.tokens, planned.needles) if tokenizer else []
        kind = "prompts of the tasks" if made else prompts.kind
        made = made or prompts.needles(planned.tokens, planned.needles)
        needles = claims.needles_found(client, keys, made, tokenizer, kind)
        progress.set_description("TTFT")
        times = ttft.measure(client, keys, prompts, planned.ttft_tokens, planned.pairs)
        progress.total = progress.n  # the plan was what is asked at most
    return [
        claims.same_dense(asked, noise),
        claims.same_hit(asked, noise, planned.prefix_cache),
        claims.isolated(asked, noise),
        claims.whole_is_dense(asked, noise),
        needles,
        claims.faster(times, args.ttft_at_most),
    ]


def _prompts(client: Client, info: dict[str, Any], keys: Keys, name: str) -> Prompts:
    """Texts as long as the server's tokenizer makes them, or token ids where it has none."""
    if info.get("skip_tokenizer_init"):
        return Ids(client.vocabulary(), name)
    texts = Texts(name)
    counted = client.ask(texts.sample(SAMPLE_WORDS), DENSE, 1, keys.new(), compared=False)
    texts.per_word = counted.prompt_tokens / SAMPLE_WORDS
    return texts


def _must_prune(client: Client, keys: Keys, prompts: Prompts, tokens: int) -> None:
    """Warm up with a pruned request. Raises VerifyError if such a one is not pruned: nothing could be shown then."""
    answer = client.ask(prompts.pair(tokens).first, PRUNED, 1, keys.new(), compared=False)
    if not answer.pruned:
        reason = answer.report.get("reason", "no reason given")
        raise VerifyError(
            f"a prompt of {answer.prompt_tokens} tokens is not pruned ({reason}): "
            "give another --tokens, or see docs/faq.md for the reason"
        )


def _command(args: argparse.Namespace) -> list[str]:
    """As it was given, but for the key and where the record goes."""
    hidden = {"api_key", "out", "command"}
    given = {name: value for name, value in vars(args).items() if name not in hidden and value is not None}
    return ["claa-sglang verify", *(f"--{key.replace('_', '-')} {value}" for key, value in given.items())]
