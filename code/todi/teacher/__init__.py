"""Who answers for the labelled rows: a live model or a cache."""
