"""The demo: a task on which visual memory can be measured, a tiny model that fades, and the training of adapters."""
