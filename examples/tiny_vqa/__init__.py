"""Tiny visual question answering on a CPU: two data sets, a language model taught from text, ways to show it an image, a race."""
