"""docs/hooks.md: every attribute of SGLang that is touched, as a document made from the table in `patches/`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from claa_sglang.patches.arguments import ARGUMENT_HOOKS
from claa_sglang.patches.hooks import SUPPORTED_SGLANG, Hook, collect


def markdown(hooks: Iterable[Hook] | None = None) -> str:
    """The document, with a newline at its end; of all rows, or of those given."""
    table = collect() + ARGUMENT_HOOKS if hooks is None else hooks
    lines = [
        "# Every attribute of SGLang that claa-sglang touches",
        "",
        f"Written for sglang {SUPPORTED_SGLANG}; made from the table in `patches/` by `python -m docs.generate`.",
        "",
        "- Without `--enable-claa` only the rows of process `always` are applied: they make the flags known.",
        "- With it, every row is compared with the installed SGLang first, and looked up again afterwards.",
        "- Rows of process `server` act for servers with `--enable-claa` alone, also where one process starts another",
        "  server without it.",
        "",
        "| process | target | kind | parameters | why |",
        "|---|---|---|---|---|",
    ]
    for hook in sorted(table, key=lambda hook: (hook.process, hook.target)):
        target = hook.target.removeprefix("sglang.srt.")
        params, why = ", ".join(hook.params), _sentence(hook.reason)
        lines.append(f"| {hook.process} | `{target}` | {hook.kind} | `({params})` | {why} |")
    return "\n".join(lines) + "\n"


def _sentence(reason: str) -> str:
    """`reason` as a sentence of the document: a name of code that begins it keeps its case and is set as code."""
    first, space, rest = reason.rstrip(".").partition(" ")
    # A word, SGLang's, one-token; anything else (sgl.Engine, custom_params["claa"], /server_info) is code.
    is_word = re.fullmatch(r"[A-Za-z]+(['-][a-z]+)*[,:;]?", first)
    return f"{first[0].upper() + first[1:] if is_word else f'`{first}`'}{space}{rest}."
