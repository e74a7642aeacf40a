"""Saved adapters and other files: checked before they are loaded, written whole or not at all."""
