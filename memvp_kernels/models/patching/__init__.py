"""How the FFNs of a Hugging Face model are given a memory, and how the model is given back as it was."""
