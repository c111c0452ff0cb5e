"""The person detector: its network, its training, its measurement and its export."""
