"""Tool calls and reasoning over a long document: python examples/tools.py [URL]

The server needs the parsers of its model, for example --tool-call-parser qwen --reasoning-parser qwen3.
"""

import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
document = Path(__file__).parents[1].joinpath("tests/prose.txt").read_text()[:6000]
hour = {"type": "integer", "minimum": 0, "maximum": 23}
ferry = {"type": "object", "properties": {"hour": hour}, "required": ["hour"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "book_ferry", "description": "Books a seat.", "parameters": ferry}}

answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": f"{document}\n\nBook a seat on the morning ferry."}],
    tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=128, temperature=0,
    extra_body={"custom_params": {"claa": {"policy": "always", "keep_rate": 0.3}}},
)  # fmt: skip
message = answer.choices[0].message
print(f"reasoning: {message.model_dump().get('reasoning_content')!r}")
for call in message.tool_calls or []:
    print(f"{call.function.name}({call.function.arguments})")
report = answer.model_dump()["metadata"]["claa"]
print(f"kept {report['kept_tokens']} of {report['prompt_tokens']} prompt tokens")
