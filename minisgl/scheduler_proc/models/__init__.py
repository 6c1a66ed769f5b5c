"""Models: their config, their weights, and the forward pass of one step."""
