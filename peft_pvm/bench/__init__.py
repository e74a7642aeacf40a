"""What the methods cost in time and memory, compared with the base and with their naive forms."""
