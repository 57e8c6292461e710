"""The machine and the process: devices, ranks, files, logs, signals. Knows no model, no data, no loss."""
