"""The command line `peft-pvm`: commands and their arguments. What they do is in `work`. It needs the extra `lab`."""
