"""A model with each method side by side, on questions about images: accuracy, latency, and what can be told apart."""
