"""`python -m peft_pvm.cli` is `peft-pvm`."""

from . import main


main()
