"""What every room uses: checks, text for messages, the terminal, pictures, the privates of other packages."""
