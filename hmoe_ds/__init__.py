"""hmoe_ds: hierarchical mixture-of-experts pretraining for molecules on DeepSpeed."""

__version__ = "0.1.0"
