"""What trains adapters to look: text between image and question, the image hidden, the layers to sit in."""
