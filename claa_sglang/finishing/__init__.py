"""Answer first, finish later: pruned prefixes become dense while the server has nothing else to do."""
