"""Datasets of questions, generation of answers, and grading."""
