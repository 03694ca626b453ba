"""`claa-sglang calibrate`: choose ranker, scored layers, prune layer and keep rate of a model by measurement.

| file | what it does |
|---|---|
| `prompts` | which prompts, and whether they are enough to say anything |
| `studied` | prompts with their studies, by source of text |
| `ranker_list` | which rankers are tried |
| `gather` | from studies to evidence |
| `evidence` | many prompts as a few tensors; how much any ranking would keep |
| `ordering` | rankings of many prompts at once |
| `threads` | how many of them |
| `target` | what a choice must keep |
| `criteria` | whether it does: margins, lower bounds |
| `candidate_layers` | which prune layers are tried |
| `search` | the best ranker and scored layers for every prune layer and keep rate, and for two steps |
| `late_scores` | what layers after a prune see, from a forward that drops rows |
| `schedule` | what one or two steps keep |
| `price` | predicted time to first token of a schedule, as a share of dense |
| `held_out` | the cheapest choice that other text confirms |
| `default` | the default beside it |
| `choose` | from studied prompts to a confirmed choice |
| `profile` | the profile file, with where its values come from |
| `report` | tables of what was chosen from |
| `pipeline`, `command` | all of it; the command line |
"""
