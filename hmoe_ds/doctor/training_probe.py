"""`python -m hmoe_ds.doctor.training_probe`: import what a rank imports; prints what DeepSpeed is here, as JSON."""

from __future__ import annotations

import json

import deepspeed
from deepspeed.git_version_info import installed_ops

import hmoe_ds.training.loop  # noqa: F401

if __name__ == "__main__":
    prebuilt = sorted(name for name, built in installed_ops.items() if built)
    print(json.dumps({"accelerator": deepspeed.get_accelerator().device_name(), "prebuilt": prebuilt}))
