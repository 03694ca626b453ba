"""Chat with OpenAI's client: python examples/openai_client.py [URL]. What was kept comes with the answer."""

import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
document = Path(__file__).parents[1].joinpath("tests/prose.txt").read_text()[:6000]
question = {"role": "user", "content": f"{document}\n\nWho is this about?"}
ASKED = {"policy": "always", "keep_rate": 0.3}  # leave them out, and the server decides

answer = client.chat.completions.create(
    model="default", messages=[question], max_tokens=32, temperature=0, extra_body={"custom_params": {"claa": ASKED}}
)
report = answer.model_dump()["metadata"]["claa"]
print(f"pruned: {answer.choices[0].message.content!r}")
print(f"kept {report['kept_tokens']} of {report['prompt_tokens']} prompt tokens")

stream = client.chat.completions.create(
    model="default", messages=[question], max_tokens=32, temperature=0, stream=True,
    extra_body={"custom_params": {"claa": {"enabled": False}}},
)  # fmt: skip
print("dense, streamed: ", end="")
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
    metadata = chunk.model_dump().get("metadata")  # of the chunk that ends the choice
    if metadata:
        print(f"\n{metadata['claa']['reason']}")
