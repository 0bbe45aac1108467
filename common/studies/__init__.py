"""Trainings that answer a question: the base model of the year, and what a training is made of."""
