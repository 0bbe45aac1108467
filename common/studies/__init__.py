"""Trainings that answer a question: of attention, of depth, of a training loop; and the base model of the year."""
