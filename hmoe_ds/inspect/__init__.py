"""What a folder is, and what a person wants to know of it first. Imports no torch and no DeepSpeed: it is quick."""
