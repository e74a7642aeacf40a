"""The fading lab: a task on which visual memory can be measured, a tiny model that fades, and its training."""
