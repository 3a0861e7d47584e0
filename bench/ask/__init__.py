"""What is asked for: presets, the typed experiment, and the plan of runs made from it."""
