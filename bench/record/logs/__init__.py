"""Reading the training logs of other programs."""
