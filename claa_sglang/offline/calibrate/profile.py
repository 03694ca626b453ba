"""The profile file of a choice, with where its values come from."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from claa_sglang.config import profile_search, profile_weights
from claa_sglang.config.profile_file import Profile, ProfileStep
from claa_sglang.config.profile_model import describe
from claa_sglang.offline.calibrate.criteria import LowerBound, Measured
from claa_sglang.offline.calibrate.held_out import TOGETHER, Verdict
from claa_sglang.offline.calibrate.price import Price
from claa_sglang.offline.calibrate.ranker_list import POOL_KERNEL
from claa_sglang.offline.calibrate.studied import Studied
from claa_sglang.offline.calibrate.target import Target
from claa_sglang.offline.records import fingerprint
from claa_sglang.tools.gguf_model import slug


def make(
    model: Any,
    verdict: Verdict,
    calibrated: Studied,
    on_calibration: Measured,
    held_out: Sequence[Studied],
    target: Target,
    price: Price,
) -> Profile:
    """The profile of a confirmed choice. model: the transformers model it was measured on.

    Prompts shorter than the shortest one measured run dense: nothing is known about them.
    """
    config = model.config.to_dict()
    name = Path(model.config.name_or_path).name
    layers = model.config.get_text_config().num_hidden_layers
    ranker = verdict.candidate.ranker
    shortest = min(study.tokens for one in (calibrated, *held_out) for study in one.studies)
    measured = {f"held out: {source}": text(one) for source, one in verdict.measured.items()}
    return Profile(
        version=1,
        model=describe(config, layers, name),
        steps=tuple(
            ProfileStep(prune_layer=s.prune_layer, keep_rate=s.keep_rate, score_layers=s.score_layers)
            for s in verdict.candidate.steps
        ),
        window=calibrated.evidence.window,
        pool_kernel=ranker.kernel or POOL_KERNEL,
        # The kernel beside it, so that a flag of its own wins over it.
        ranker=str(replace(ranker, kernel=None)),
        min_prompt_tokens=shortest,
        provenance={
            "made by": f"claa-sglang calibrate {version('claa-sglang')}",
            "date": datetime.now(UTC).date().isoformat(),
            "weights": f"{model.dtype} on {model.device.type}, sha256 of samples {fingerprint(model)}",
            **weights(model),
            "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers")),
            "target": f"oracle mass {target.mass:g} of what the oracle keeps at {target.reference_rate:g}, "
            f"answer tokens in needles {target.recall:g}, whole answers {target.whole:g}",
            f"calibrated on: {calibrated.name}": text(on_calibration),
            **measured,
            f"whole answers, {TOGETHER}": _bound(verdict.whole),
            "bounds": "one-sided, bootstrap over prompts, whole answers exact (Clopper and Pearson): 95 % on the "
            "calibration text, 99 % on held-out text",
            "prompts": "; ".join(contents(one) for one in (calibrated, *held_out)),
            "predicted": f"{verdict.candidate.share:.3f} of dense prefill time at {price.tokens:,} tokens, seconds per "
            f"layer pass, row, pair, prune: {', '.join(f'{c:.3g}' for c in price.constants[:4])}",
        },
    )


def text(one: Measured) -> str:
    """A measurement in a line: means and lower bounds, and means at every length where there are several."""
    parts = [f"oracle mass {_bound(one.mass)}", f"needles {_bound(one.recall)}", f"whole answers {_bound(one.whole)}"]
    parts += [
        f"at {length} tokens {means.mass:.3f}, {means.recall:.3f}, {means.whole:.3f}"
        for length, means in one.lengths.items()
    ]
    return ", ".join(parts)


def _bound(one: LowerBound) -> str:
    return f"{one.mean:.3f} (at least {one.low:.3f}, {one.prompts} prompts)" if one.prompts else "none known"


def contents(studied: Studied) -> str:
    """What prompts a set has: counts by task, lengths and seeds."""
    prompts = [sample.prompt for sample in studied.samples]
    tasks = ", ".join(f"{count} {task}" for task, count in sorted(Counter(p.task for p in prompts).items()))
    chats = sum(not p.answer_prefix for p in prompts)
    tokens, seeds = sorted(studied.evidence.tokens), sorted({p.seed for p in prompts})
    forms = f"{chats} without the beginning of the answer"
    return f"{studied.name}: {tasks}, {forms}, {tokens[0]} to {tokens[-1]} tokens, seeds {seeds[0]} to {seeds[-1]}"


def weights(model: Any) -> dict[str, str]:
    """What a server compares its weights with, as an entry of provenance; empty for a model it cannot compare."""
    samples = profile_weights.of_checkpoint(model)
    return {profile_weights.KEY: profile_weights.written(samples)} if samples else {}


def keep(profile: Profile) -> Path | None:
    """Write a copy where a server looks for profiles, named after the model and its weights; returns its path.

    The same model calibrated again replaces its copy. None where the user has no folder. Raises OSError.
    """
    if (folder := profile_search.user_folder()) is None:
        return None
    known = profile.provenance.get(profile_weights.KEY) or profile.provenance.get("weights", "")
    made_for = msgspec.json.encode(profile.model) + known.encode()
    path = folder / f"{slug(profile.model.name)}-{hashlib.sha256(made_for).hexdigest()[:8]}.json"
    write(profile, path)
    return path


def write(profile: Profile, path: Path) -> None:
    """Write it whole or not at all, readable for people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    temporary.replace(path)
