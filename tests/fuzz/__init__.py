"""Damaged adapter folders by the thousand: each is refused with a clear error, or loads without touching the base.

`python -m fuzz --folders 20000` in `tests/` runs many; `test_fuzz.py` runs some of them with the other tests.
"""
