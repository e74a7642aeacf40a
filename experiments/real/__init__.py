"""The second base: a real pretrained language model that was taught to read mosaics, see docs/real-model.md."""
