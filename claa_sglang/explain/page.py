"""The page: one HTML file with everything in it, which asks nothing of any network.

Text of the prompt and of the answer goes into it through `shown` and `html.escape` alone; numbers for the script are
JSON in which no `<` is left.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from claa_sglang import __version__
from claa_sglang.explain import looked_at
from claa_sglang.explain.asking import Explained
from claa_sglang.explain.texts import TokenText
from claa_sglang.explain.views import RANKING, View, levels, make_views

LISTED = 40  # tokens that the answer looked at most
CONTEXT = 4  # tokens on each side of a listed one
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
SEVERAL = '<li><span class="some">kept by an earlier prune only</span></li>'
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "": "∅"}


def make_page(found: Explained) -> str:
    """The HTML of one explained prompt."""
    views = make_views(found)
    shares = looked_at.mean_of(found.looked_at) if found.looked_at else []
    parts = {
        "title": html.escape(f"What CLAA kept of a prompt of {found.report['prompt_tokens']:,} tokens"),
        "facts": _facts(found),
        "answer": html.escape(shown(found.answer)) or "<i>The answer is empty.</i>",
        "looked": _looked(found, shares),
        "several": SEVERAL if len(steps_of(found.report)) > 1 else "",
        "options": "".join(f'<option value="{view.key}">{html.escape(view.label)}</option>' for view in views),
        "tokens": _tokens(found, views[0]),
        "data": _data(found, views),
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"<!--(\w+)-->", lambda place: parts[place[1]], template)


def shown(text: str) -> str:
    """`text` with what has no shape, or would change the direction of what follows, written out."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def survived(report: Mapping[str, Any]) -> list[int]:
    """Of each prompt token, how many prunes kept it."""
    counts = [0] * report["prompt_tokens"]
    for step in steps_of(report):
        for position in step["kept"]:
            counts[position] += 1
    return counts


def steps_of(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return report.get("steps") or [report]


def _facts(found: Explained) -> str:
    report, info = found.report, found.info
    steps = steps_of(report)
    window = report["prompt_tokens"] - len(report["explain"]["steps"][0]["scores"])
    after = "; ".join(f"after layer {s['prune_layer']}, ranked by layers {_listed(s['score_layers'])}" for s in steps)
    rates = ", ".join(f"{s['keep_rate']:.4g}" for s in steps)
    kept = ", then ".join(f"{s['kept_tokens']:,}" for s in steps)
    scorer = (info["claa"].get("scorer") or {}).get("scorer", "not told")
    rows = {
        "Model": info.get("model_path", "not told"),
        "Prompt": f"{report['prompt_tokens']:,} tokens",
        "Kept": f"{kept} tokens: the best by score, the first one, and the last {window}",
        "Keep rate": rates,
        "Pruned": after,
        "Ranker": f"{report['ranker']}, scored with {scorer}",
        "Layers": f"{info['claa']['config']['num_layers']}",
        "Versions": f"claa-sglang {__version__}, SGLang {info.get('version', 'not told')}",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(shown(str(value)))}</dd>" for name, value in rows.items())


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def _looked(found: Explained, shares: Sequence[float]) -> str:
    if not shares:
        return "<p>Nothing: the answer has no token, or the ranker looks at no layer.</p>"
    kept = steps_of(found.report)[0]["kept"]
    scores = found.report["explain"]["steps"][0]["scores"]
    always = {0, *range(len(scores), len(shares))}
    which = "kept" if len(steps_of(found.report)) == 1 else "that the first prune kept"
    head = (
        f"<p>Attention of {_which(found)} over the prompt, in the layers that rank. "
        "Up to there every layer sees every token. Later layers look only at what was kept, and are not shown. "
        "A share is the mean weight over these tokens, the heads and the layers.</p>"
    )
    by_layer = [*((f"layer {layer}", values) for layer, values in found.looked_at.items())]
    if len(by_layer) > 1:
        by_layer.append(("mean", shares))
    rows = "".join(
        f"<tr><th scope=row>{name}</th><td>{_percent(sum(value or 0.0 for value in values))}</td>"
        f"<td>{_percent(looked_at.on_kept(values, kept))}</td>"
        f"<td>{_percent(looked_at.on_kept(values, kept, without=always))}</td></tr>"
        for name, values in by_layer
    )
    mass = (
        "<table class=mass><caption>How much of that was kept</caption><thead><tr><th scope=col>Layer</th>"
        f"<th scope=col>On the prompt</th><th scope=col>Of that, on tokens {which}</th>"
        "<th scope=col>The same without what is always kept</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        "<p class=note>Always kept are the first token, on which models park attention, and the last "
        f"{len(shares) - len(scores)}.</p>"
    )
    looks = looked_at.most(shares, LISTED, without=always)
    counts = survived(found.report)
    most = "".join(_look_row(found, look, counts[look.position], scores) for look in looks)
    listed = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Tokens the answer looked at most">'
        f'<table class="looks"><caption>The {len(looks)} tokens it looked at most, without what is always '
        "kept</caption><thead><tr>"
        "<th scope=col>Position</th><th scope=col>Token</th><th scope=col>In its place</th><th scope=col>Share</th>"
        f"<th scope=col>Score</th><th scope=col>Kept</th></tr></thead><tbody>{most}</tbody></table></div>"
    )
    return head + mass + listed


def _which(found: Explained) -> str:
    if found.looking == 1:
        return "the one token of the answer" if found.answer_tokens == 1 else "the answer's first token"
    return f"the answer's {'first ' if found.looking < found.answer_tokens else ''}{found.looking} tokens"


def _look_row(found: Explained, look: looked_at.Looked, count: int, scores: Sequence[float | None]) -> str:
    """count: prunes that kept it."""
    position, fate = look.position, _fate(count, len(steps_of(found.report)))
    around = range(max(0, position - CONTEXT), min(len(found.tokens), position + CONTEXT + 1))
    texts = {i: _escaped(found.tokens[i]).replace("\n", VISIBLE["\n"]) for i in around}
    place = "".join(f"<b>{text}</b>" if i == position else text for i, text in texts.items())
    token = html.escape(visible(found.tokens[position]))
    return (
        f'<tr class="{fate.split()[0]}"><td><a href="#t{position}">{position}</a></td>'
        f"<td><code>{token}</code></td><td class=place>{place}</td><td>{_percent(look.share)}</td>"
        f"<td>{_score(scores[position])}</td><td>{fate if fate == 'kept' else f'<strong>{fate}</strong>'}</td></tr>"
    )


def visible(token: TokenText) -> str:
    """A token's text where it stands alone: blanks have a shape."""
    if token.part_of and not token.text:
        return f"(of {token.part_of.strip()})"
    text = shown(token.text)
    return "".join(VISIBLE.get(c, c) for c in text) or VISIBLE[""]


def _score(score: float | None) -> str:
    return "none" if score is None else f"{score:.4g}"


def _percent(share: float) -> str:
    return "none" if share != share else f"{100 * share:.3g} %"


def _escaped(token: TokenText) -> str:
    return html.escape(shown(token.text))


def _tokens(found: Explained, view: View) -> str:
    """One element for each token: a `mark` if it went through all prunes, with its level of the first view."""
    counts, steps = survived(found.report), len(steps_of(found.report))
    shades = levels(view.values)
    parts = []
    for position, (token, count, shade) in enumerate(zip(found.tokens, counts, shades, strict=True)):
        name = "mark" if count == steps else "span"
        classes = f"{shade}{' some' if 0 < count < steps else ''}"
        text = _escaped(token)
        if not text:  # a later part of a character
            text, classes = "‹", f"{classes} part"
        title = html.escape(f"{position}: {_title(token, count, steps, view.values[position], position, found)}")
        parts.append(f'<{name} id="t{position}" class="{classes}" title="{title}">{text}</{name}>')
    return "".join(parts)


def _title(token: TokenText, count: int, steps: int, score: float | None, position: int, found: Explained) -> str:
    fate = _fate(count, steps)
    part = f", part of {shown(token.part_of)}" if token.part_of else ""
    if position >= len(found.report["explain"]["steps"][0]["scores"]):
        return f"{fate}, in the window{part}"
    return f"{fate}, score {_score(score)}{part}"


def _fate(count: int, steps: int) -> str:
    """Of a token that so many of all prunes kept."""
    if count == steps:
        return "kept"
    return "dropped" if count == 0 else f"dropped by prune {count + 1}"


def _data(found: Explained, views: Sequence[View]) -> str:
    """JSON for the script. In a script element only `<` can end or open anything."""
    data = {
        "first": RANKING,
        "views": {view.key: {"label": view.label, "about": view.about, "values": view.values} for view in views},
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
