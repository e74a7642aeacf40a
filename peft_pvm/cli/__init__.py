"""The command `peft-pvm`: how its commands are called. What they do is in `work`. It needs the extra `lab`."""
