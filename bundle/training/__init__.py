"""Training: the trainer, the run folder, the curriculum, the loss, several processes."""
