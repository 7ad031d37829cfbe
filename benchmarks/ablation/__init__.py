"""What each part of H-MoE is worth: `python -m benchmarks.ablation`."""
