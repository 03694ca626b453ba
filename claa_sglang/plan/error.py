"""What stops a plan."""


class PlanError(ValueError):
    """Nothing can be planned from what was given; the text says why and what to give instead, in one line."""
