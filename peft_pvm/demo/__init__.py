"""The demo: a task that measures visual memory, a tiny model that forgets its image, and the training of adapters."""
