"""What every configuration must be, whatever it was made of."""

from __future__ import annotations

from claa_sglang.config.config import ClaaConfig


def assert_consistent(config: ClaaConfig, num_layers: int) -> None:
    """Every value of `config` is in range, and its steps go up in layers and down in rates, or keep all."""
    assert config.num_layers == num_layers and config.steps
    assert 1 <= config.window <= 1024 and 1 <= config.pool_kernel <= 1023 and config.pool_kernel % 2 == 1
    assert 0 <= config.min_prompt_tokens < 2**31
    previous_layer, previous_rate = -1, 2.0
    for step in config.steps:
        assert previous_layer < step.prune_layer <= num_layers - 2 and type(step.keep_rate) is float
        assert 0 < step.keep_rate <= 1
        assert step.keep_rate < previous_rate or step.keep_rate == previous_rate == 1
        assert step.score_layers and list(step.score_layers) == sorted(set(step.score_layers))
        assert previous_layer < step.score_layers[0] and step.score_layers[-1] <= step.prune_layer
        previous_layer, previous_rate = step.prune_layer, step.keep_rate
    assert config.to_dict()["namespace"] == config.namespace
