"""Studies of rankings with a Hugging Face model, away from a server: oracle, rank report, calibration.

Needs transformers, which is imported where it is used; never SGLang.
"""
