"""What happens: a fresh worker process for each run, and the one training loop."""
