"""Long-context tasks with known answers, in the style of RULER (Hsieh et al., arXiv 2404.06654).

A task hides what is asked in filler text (`sources`), a prompt is fitted to a length in the model's own tokens
(`fit`), and an answer is graded by what it contains (`grade`). Nothing here needs torch or SGLang; the tokenizer is
the caller's.

Words come from wonderwords, as in RULER. The rest is ours because the libraries that have RULER do not fit here:
- sgl-eval 0.1.3 cannot be installed beside SGLang 0.5.23: it pins pandas below 3 and datasets below 5.
- lm-eval and NVIDIA's RULER download their filler text (essays) and questions (SQuAD, HotpotQA) when they run; neither
  has several sources of filler, which a calibration needs to be tested on text it was not made on. lm-eval also grades
  inside its own model runner, so the same prompts could not be given to an offline study.
"""
