"""From JSON lines to batches."""
