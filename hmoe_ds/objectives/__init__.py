"""What pretraining optimises: masking, scaffold routing contrast, router losses, and their sum."""
