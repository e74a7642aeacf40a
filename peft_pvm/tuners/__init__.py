"""The side that PEFT sees: configurations, layers and tuners, and which adapters act."""
