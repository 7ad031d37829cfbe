"""The molecular encoder and its pretraining heads."""
