"""What the records mean: the comparison and the verdicts."""
