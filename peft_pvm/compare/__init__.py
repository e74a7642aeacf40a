"""Compares a model with each method side by side, on questions about images: accuracy, latency and significance."""
