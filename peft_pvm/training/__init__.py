"""What makes a training work on the user's own model and data."""
