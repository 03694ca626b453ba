"""`claa-sglang calibrate`: choose scored layers, prune layer and keep rate of a model by measurement.

| file | what it does |
|---|---|
| `prompts` | prompts as token ids, and where their needles are |
| `evidence` | studies of many prompts as a few tensors; how much any ranking would keep |
| `target` | what a choice must keep |
| `criteria` | whether it does: margins, confidence intervals |
| `studied` | prompts with their studies, by source of text |
| `search` | the best scored layers for every prune layer and keep rate, and for two steps |
| `late_scores` | what layers after a prune see, from a forward that drops rows |
| `schedule` | what one or two steps keep |
| `price` | predicted time to first token of a schedule, as a share of dense |
| `held_out` | the cheapest choice that another source of text confirms |
| `profile` | the profile file, with where its values come from |
| `report` | tables of what was chosen from |
| `command` | the command line |
"""
