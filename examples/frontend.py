"""Three questions over one document, in SGLang's frontend language: python examples/frontend.py [URL].

The document is computed once: `fork` makes copies of the conversation that share it. SGLang's `gen` has no place for
the options of a request, so the server's own count.
"""

import sys
from pathlib import Path

import sglang as sgl

QUESTIONS = ("Who is this about?", "Where does it happen?", "How does it end?")


@sgl.function
def ask(s, document):
    s += sgl.user_begin() + document + "\n\n"
    forks = s.fork(len(QUESTIONS))
    for fork, question in zip(forks, QUESTIONS, strict=True):
        fork += question + sgl.user_end()
        fork += sgl.assistant_begin() + sgl.gen("answer", max_tokens=24, temperature=0)
    forks.join()
    s["answers"] = [fork["answer"] for fork in forks]


sgl.set_default_backend(sgl.RuntimeEndpoint(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"))
state = ask.run(document=Path(__file__).parents[1].joinpath("tests/prose.txt").read_text()[:6000])
for question, answer in zip(QUESTIONS, state["answers"], strict=True):
    print(f"{question} {answer.strip()!r}")
