"""Each op in plain torch, for any device and floating dtype: the definition of correct, and what always runs."""
