"""The parts of `examples/digits.py`: handwritten digits, questions about them, and two ways to show them to a language model."""
