"""The parts of ``examples/scienceqa.py``: the official data, prompts, recipe and score table of ScienceQA."""
