"""A model's weights as decoding reads them: packed once from live modules."""
