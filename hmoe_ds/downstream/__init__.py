"""What chemists do with a pretrained model. Needs no DeepSpeed."""
