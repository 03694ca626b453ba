"""What was asked for, may it run, and how many tokens are kept. Needs neither torch nor SGLang."""
