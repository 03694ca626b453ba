"""Questions over documents that are shared, as retrieval makes them: python examples/rag.py [URL].

Prints how much of each prompt came from the prefix cache and how much of it the late layers saw.
"""

import sys
from pathlib import Path

import requests

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
text = Path(__file__).parents[1].joinpath("tests/prose.txt").read_text()
documents = {"first": text[:4000], "second": text[4000:8000]}
ASKED = [("first", "Who is this about?"), ("second", "Who is this about?"), ("first", "Where does it happen?")]

print("document  prompt  cached  kept  answer")
for name, question in ASKED:
    # What is shared comes first: a prefix hit ends where prompts begin to differ.
    prompt = f"{documents[name]}\n\nQuestion: {question}\nAnswer:"
    claa = {"policy": "always", "keep_rate": 0.3}
    params = {"temperature": 0, "max_new_tokens": 12, "custom_params": {"claa": claa}}
    answer = requests.post(f"{url}/generate", json={"text": prompt, "sampling_params": params}, timeout=600).json()
    report = answer["meta_info"]["claa"]
    counts = (report["prompt_tokens"], report["early_cached_tokens"], report["kept_tokens"])
    print("{:8}  {:6}  {:6}  {:4}  {!r}".format(name, *counts, answer["text"].strip()))
