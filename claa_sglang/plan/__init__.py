"""`claa-sglang plan`: what pruning would bring a model on a machine, before anything is served.

| file | what it does |
|---|---|
| `model` | what of a config.json decides |
| `machine` | the record of a machine |
| `measure` | making one, in seconds |
| `predict` | seconds to the first token |
| `room` | KV slots, bytes, how many requests fit |
| `pays_from` | from which prompt length on it is faster |
| `rows` | all of it for several prune layers and keep rates |
| `table` | as text |
| `command` | the command line |
"""
