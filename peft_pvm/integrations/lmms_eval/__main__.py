from . import tasks_folder


print(tasks_folder())
