"""Plain PyTorch, any float dtype: the definition of right that every kernel is checked against, and the fallback."""
