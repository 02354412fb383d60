"""Questions, their answers by a model, and the grading of these."""
