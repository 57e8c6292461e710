"""The training run: inputs, student, optimizer, the loop, and what it leaves behind."""
