"""One kernel with its launcher per file, named for what it computes."""
