"""Training, evaluation and prediction: one function each, to be read from top to bottom."""
