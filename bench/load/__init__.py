"""What is loaded: weights, layers, adapters, and the contract a backend keeps."""
