"""How a model is trained: the loss, objectives, optimizers and schedules, the trainer, snapshots, several processes."""
