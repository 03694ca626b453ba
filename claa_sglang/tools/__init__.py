"""What a machine without a GPU or a model hub needs."""
