"""Judging somebody else's training log: what happened, and from which step on."""
