"""The losses of training: of tokens, and of rows compared with each other across processes."""
