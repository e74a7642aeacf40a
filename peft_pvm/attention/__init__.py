"""The attention of a text model, as adapters change it: what a call knows, what stages do to it, how it gets there."""
