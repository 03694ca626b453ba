"""A batch without a server, in this process: python examples/offline_batch.py MODEL."""

import sys
from pathlib import Path

import sglang as sgl
import torch

CPU = {"device": "cpu", "attention_backend": "torch_native", "dtype": "float32", "max_total_tokens": 20_000}

if __name__ == "__main__":  # SGLang starts this file again in its processes
    text = Path(__file__).parents[1].joinpath("tests/prose.txt").read_text()
    prompts = [text[start : start + 5500] + "\n\nIn one word, this is about" for start in (0, 4000)]
    more = {} if torch.cuda.is_available() else CPU
    with sgl.Engine(model_path=sys.argv[1], enable_claa=True, claa_policy="always", **more) as engine:
        answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 8})
    for answer in answers:
        report = answer["meta_info"]["claa"]
        print(f"kept {report['kept_tokens']} of {report['prompt_tokens']}: {answer['text']!r}")
