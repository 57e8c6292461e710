"""Training: devices, the DeepSpeed engine, the loop, checkpoints and logs."""
