"""DeepSpeed settings (ZeRO stage, precision, buckets) shipped as package data."""
