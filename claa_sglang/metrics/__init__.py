"""What a server exports on /metrics, beside SGLang's own metrics and under its labels."""
