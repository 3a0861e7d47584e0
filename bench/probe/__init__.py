"""What is observed: time, memory, gradients and the machine."""
