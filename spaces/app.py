"""`peft-pvm app` as a Hugging Face Space."""

import sys

from peft_pvm_cli import main


sys.argv = ["peft-pvm", "app", "--host", "0.0.0.0"]
main()
