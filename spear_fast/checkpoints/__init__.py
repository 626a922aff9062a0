"""What holds a model: files of weights, model folders, and a live model of spear-tts-pytorch."""
