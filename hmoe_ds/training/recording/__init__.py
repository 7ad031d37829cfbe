"""What a run tells of itself: metrics, health, the terminal, `metrics.jsonl`, MLflow and other monitors."""
