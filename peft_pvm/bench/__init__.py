"""What the remedies cost in time and memory, beside the base and beside themselves written naively."""
