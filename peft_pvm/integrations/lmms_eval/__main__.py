"""`python -m peft_pvm.integrations.lmms_eval` prints the folder of the tasks."""

from . import tasks_folder


print(tasks_folder())
