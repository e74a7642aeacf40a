"""What other packages need to work with the adapters. Each module needs its package; the library needs none."""
