"""The teacher cache: its files, the pass that fills them, when it pays, and the teacher source that reads them."""
