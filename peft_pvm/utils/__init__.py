"""What all rooms use: checks, text for messages, the terminal, pictures, private names of other packages."""
