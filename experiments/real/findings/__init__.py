"""What is behind the results of the real base: questions, each with its measurement, its file and its words."""
